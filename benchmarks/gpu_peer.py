# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one micro-batch, ours beside transformers with SDPA: same sizes, same shapes, one GPU, bf16.

    python -m benchmarks.gpu_peer qwen2_5_vl_7b:20x448 qwen3_vl_8b:20x512 qwen3_vl_8b:1x512

Each argument is a published size and how many images of which side stand in its 8,192 tokens. Both sides use random
weights, keep all activations, and no optimizer. Prints one JSON line a case, with the ratio.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable

import torch
import transformers
from torch.nn.functional import cross_entropy

from models.common.batch import IGNORED_LABEL, Batch
from models.common.settings import ModelSettings, resolve_attention_backend
from models.contract.architecture import Architecture
from models.contract.families import family_part, published_architecture, published_config
from models.contract.launcher import read_launcher_environment
from models.datasets.fixed_shapes import RowShape, fixed_batch
from models.training.parallel import start_megatron, stop_distributed

SEQ_LENGTH = 8192


def median_ms(step: Callable[[], None], *, repeats: int = 6, warm_up: int = 3) -> float:
    """Median time of a step on the device."""
    times = []
    for _ in range(repeats + warm_up):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warm_up:])


def time_ours(architecture: Architecture, batch: Batch) -> float:
    """Our model with the backend that `auto` takes."""
    backend = resolve_attention_backend("auto", "cuda")
    settings = ModelSettings(
        device="cuda", dtype=torch.bfloat16, attention_backend=backend, init_method_std=0.02
    )
    model = family_part(architecture.family, "model").build_model(architecture, settings).cuda()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (model(batch).sum() / batch.num_supervised_tokens).backward()

    return median_ms(step)


def time_transformers(name: str, batch: Batch) -> float:
    """Transformers' model with SDPA, loss over the same labels."""
    hf_config = published_config(name)
    config = transformers.CONFIG_MAPPING[hf_config["model_type"]].from_dict(hf_config)
    config._attn_implementation = "sdpa"
    kind = getattr(transformers, hf_config["architectures"][0])
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = kind(config)
        torch.set_default_dtype(torch.float32)
    model.train()
    assert batch.labels is not None
    labels = batch.labels.flatten()
    is_image = torch.zeros_like(batch.input_ids).flatten()
    inputs = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
    if batch.pixel_values is not None:
        assert batch.vision_positions is not None
        assert batch.grid_thw is not None
        is_image[batch.vision_positions] = 1
        inputs |= {"pixel_values": batch.pixel_values, "image_grid_thw": batch.grid_thw.cuda()}
    inputs["mm_token_type_ids"] = is_image.view_as(batch.input_ids)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(**inputs).logits.float()
        cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED_LABEL).backward()

    return median_ms(step)


def main() -> None:
    """Run every case."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    from benchmarks.gpu_step import case_parser, make_recipe

    for argument in sys.argv[1:]:
        name, _, images = argument.partition(":")
        count, _, side = images.partition("x")
        architecture = published_architecture(name)
        recipe = make_recipe(case_parser().parse_args(["--model", name]), 1, architecture.family)
        start_megatron(recipe, read_launcher_environment(), timeout_s=300)
        shape = RowShape(seq_length=SEQ_LENGTH, num_images=int(count), image_size=int(side))
        batch = fixed_batch(architecture, shape).to("cuda")
        row: dict[str, object] = {"model": name, "images": images, "seq_length": SEQ_LENGTH}
        for side_name, run in (
            ("transformers_ms", lambda name=name, batch=batch: time_transformers(name, batch)),
            ("ours_ms", lambda architecture=architecture, batch=batch: time_ours(architecture, batch)),
        ):
            torch.cuda.reset_peak_memory_stats()
            try:
                row[side_name] = round(run(), 1)
                row[side_name.replace("_ms", "_gib")] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            except (RuntimeError, ValueError, TypeError) as error:
                row[side_name] = f"{type(error).__name__}: {error}"[:200]
            gc.collect()
            torch.cuda.empty_cache()
        if all(isinstance(row[key], float) for key in ("transformers_ms", "ours_ms")):
            row["times_faster"] = round(row["transformers_ms"] / row["ours_ms"], 3)  # type: ignore[operator]
        print(json.dumps(row), flush=True)
        stop_distributed()


if __name__ == "__main__":
    main()
