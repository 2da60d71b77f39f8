# SPDX-License-Identifier: Apache-2.0
"""One process of a layout test: load a HF folder at a layout, compare, save with megatron-core, load the rest.

    python -m torch.distributed.run --nproc-per-node N layout_worker.py PLAN.json

The plan lists steps: {"hf": folder, "layout": {tp, pp, ep, etp, vpp}, "save": folder, "load": [torch_dist folders]}.
Every tensor of every model starts as NaN.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import distributed

from models.common.settings import ModelSettings
from models.contract.families import family_part, load_architecture
from models.conversion.load import load_hf_weights
from models.conversion.torch_dist import model_state
from models.training.cpu import enable_cpu


def main() -> None:
    enable_cpu()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for step in json.loads(Path(sys.argv[1]).read_text()):
        run(step)
    distributed.barrier()
    distributed.destroy_process_group()


def run(step: dict) -> None:
    layout = {"tp": 1, "pp": 1, "ep": 1, "etp": None, "vpp": None} | step["layout"]
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    loaded = empty_model(step, layout)
    load_hf_weights(loaded, Path(step["hf"]))
    values = parameters(loaded)
    assert not any(value.isnan().any() for value in values.values()), "a parameter was not filled"
    folder = Path(step["save"])
    if distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    distributed.barrier()
    dist_checkpointing.save(model_state(loaded), str(folder))
    for other in step["load"]:
        chunks = empty_model(step, layout)
        states = dist_checkpointing.load(model_state(chunks), other, strict=StrictHandling.RAISE_ALL)
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(states["model" if len(chunks) == 1 else f"model{index}"], strict=False)
        for name, value in parameters(chunks).items():
            assert torch.equal(value, values[name]), f"{name} from {other} at {layout}"
    parallel_state.destroy_model_parallel()


def empty_model(step: dict, layout: dict) -> list[torch.nn.Module]:
    architecture = load_architecture(Path(step["hf"]))
    settings = ModelSettings(
        dtype=getattr(torch, step.get("dtype", "float32")),
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        sequence_parallel=layout["tp"] > 1,
    )
    chunks = []
    for index in range(layout["vpp"] or 1):
        vp_stage = index if layout["vpp"] else None
        chunks.append(
            family_part(architecture.family, "model").build_model(
                architecture,
                settings,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return chunks


def parameters(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{name}": p.detach() for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()
    }


if __name__ == "__main__":
    main()
