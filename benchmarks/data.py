# SPDX-License-Identifier: Apache-2.0
"""Cost of the data path, as ratios within one run: ``python -m benchmarks.data CHECKPOINT``; prints JSON.

prepare   samples a second and core that `data prepare` writes, against decoding and resizing the same images alone
loader    samples a second, against bare energon with the same task encoder and without any cache
packing   real tokens over padded tokens on length mixes like LLaVA's, with a vision-token budget
memory    growth of this process from the first tenth to the end of a long stream (``--stream 100000``)

Rates are taken in turns, several times, and the best of each counts: other work on the machine only makes one slower.
"""

import argparse
import gc
import io
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from megatron.energon import get_savable_loader
from megatron.energon.metadataset.loader_interface import LoadedDataset
from PIL import Image

from models.contract.families import detect_family, load_architecture, read_hf_config
from models.contract.recipe import Recipe, parse_recipe
from models.datasets.collate import make_collate
from models.datasets.encoder import SampleEncoder, make_encoder
from models.datasets.energon import ChatTaskEncoder, open_dataset, worker_config
from models.datasets.ledger import SkipLedger
from models.datasets.loader import BatchLoader
from models.datasets.packing import packing_buffer_size, plan_packs
from models.datasets.prepare.job import write_dataset
from models.datasets.prepare.llava import ConvertLlava
from models.datasets.prepare.source import open_source
from models.datasets.shards import RawSample
from models.datasets.streams import open_streams

SIDES = ((336, 336), (336, 500), (480, 640))
SEQ_LENGTH = 8192
BUDGET = 7168
"""Vision tokens of a pack: seven eighths of its length."""


def write_llava(folder: Path, count: int) -> list[dict[str, Any]]:
    """A folder like LLaVA-Pretrain: photographs' sizes, JPEG, one caption each."""
    (folder / "images").mkdir(parents=True)
    rng, entries = np.random.default_rng(0), []
    for index in range(count):
        height, width = SIDES[index % len(SIDES)]
        coarse = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / f"images/{index}.jpg"
        )
        turns = [
            {"from": "human", "value": "<image>\nDescribe."},
            {"from": "gpt", "value": "a picture of things " * 6},
        ]
        entries.append({"id": str(index), "image": f"images/{index}.jpg", "conversations": turns})
    return entries


def decode_and_resize(folder: Path, entries: list[dict[str, Any]]) -> float:
    """Samples a second of the plain work."""
    start = time.perf_counter()
    for entry in entries:
        image = Image.open(io.BytesIO((folder / entry["image"]).read_bytes())).convert("RGB")
        image.resize((image.width // 28 * 28, image.height // 28 * 28), Image.Resampling.BICUBIC)
    return len(entries) / (time.perf_counter() - start)


def prepare(folder: Path, entries: list[dict[str, Any]], output: Path, *, verify: Any) -> float:
    """Samples a second of writing an indexed dataset in one process."""
    start = time.perf_counter()
    convert = ConvertLlava(open_source(folder), verify=verify)
    write_dataset(output, {"train": entries}, convert, about={"source": "benchmark"})
    return len(entries) / (time.perf_counter() - start)


def recipe_for(checkpoint: Path, dataset: Path) -> Recipe:
    """One rank, rows padded to the longest."""
    return parse_recipe(
        {
            "name": "benchmark",
            "model": {"family": detect_family(read_hf_config(checkpoint)), "checkpoint": str(checkpoint)},
            "data": {"dataset": str(dataset), "seq_length": SEQ_LENGTH, "padding": "longest"},
            "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "optimizer": {"lr": 1e-4},
        },
        where="benchmark",
    )


def our_loader(recipe: Recipe, encoder: SampleEncoder, count: int) -> BatchLoader:
    """The loader as training has it, around an encoder that keeps nothing."""
    folder = recipe.data.dataset
    return BatchLoader(
        open_streams(recipe, folder, count, encoder, 0, 1),
        make_collate(recipe, encoder, packing=False),
        samples_per_batch=1,
        ledger=SkipLedger(folder, count, 0.05),
        layout={},
    )


def bare_energon(folder: str, encoder: SampleEncoder) -> Iterator[Any]:
    """Energon with a task encoder, without anything of ours around it."""
    config = worker_config(0, 1, 0, 1234)
    built = ChatTaskEncoder(encoder).build_train_datasets(
        datasets=[LoadedDataset(dataset=open_dataset(folder, "train", config, training=True))],
        worker_config=config, batch_size=None, shuffle_buffer_size=100,
    )  # fmt: skip
    return iter(get_savable_loader(built, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None))


def rate_of(stream: Iterator[Any], count: int) -> float:
    """Samples a second."""
    start = time.perf_counter()
    for _ in itertools.islice(stream, count):
        pass
    return count / (time.perf_counter() - start)


def packing_efficiency(seed: int = 0) -> dict[str, float]:
    """Real over padded tokens of all packs of one full buffer, for three mixes of lengths."""
    rng = np.random.default_rng(seed)
    mixes = {
        # captions of one image; several turns about one image; half of them with text alone
        "llava_pretrain": lambda: (int(rng.integers(144, 300)), int(rng.integers(20, 90))),
        "llava_instruct": lambda: (int(rng.integers(256, 760)), int(rng.gamma(3.0, 120.0)) + 40),
        "mixed": lambda: (int(rng.integers(256, 760)) * int(rng.random() < 0.5), int(rng.gamma(2.0, 250.0)) + 30),
    }  # fmt: skip
    found = {}
    for seq_length in (4096, SEQ_LENGTH):
        budget = BUDGET * seq_length // SEQ_LENGTH
        for name, draw in mixes.items():
            samples = [draw() for _ in range(max(256, min(2048, seq_length // 4)))]
            lengths = [vision + text for vision, text in samples]
            packs = plan_packs(
                lengths, [vision for vision, _ in samples], capacity=seq_length, vision_budget=budget
            )
            assert all(sum(samples[index][0] for index in pack) <= budget for pack in packs)
            found[f"{name}_{seq_length}"] = sum(lengths) / (len(packs) * seq_length)
    return found


def text_entry(index: int) -> RawSample:
    """A short chat without media."""
    chat = {
        "messages": [
            {"role": "user", "content": f"Say {index}."},
            {"role": "assistant", "content": "a " * 20},
        ]
    }
    return RawSample(f"t{index:06d}", {"json": json.dumps(chat).encode()})


def stream_memory(checkpoint: Path, folder: Path, encoder_of: Any, count: int) -> dict[str, Any]:
    """Resident memory of this process at every tenth of a long stream of short samples."""
    dataset = folder / "texts"
    write_dataset(dataset, {"train": range(2000)}, text_entry, about={"source": "benchmark"})
    recipe = recipe_for(checkpoint, dataset)
    loader, process, points = our_loader(recipe, encoder_of(recipe), 2000), psutil.Process(), []
    for _ in range(10):
        rate_of(loader, count // 10)
        gc.collect()
        points.append(process.memory_info().rss / 2**20)
    return {
        "samples": count,
        "resident_mib": [round(point, 1) for point in points],
        "growth_mib": points[-1] - points[0],
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=200, help="Images of the rates.")
    parser.add_argument("--stream", type=int, default=20_000, help="Samples of the memory measurement.")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint, repeats = arguments.checkpoint, range(arguments.repeats)
    architecture = load_architecture(checkpoint)

    def encoder_of(recipe: Recipe) -> SampleEncoder:
        return make_encoder(recipe.data, architecture, checkpoint, cache_bytes=0)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = write_llava(folder / "llava", arguments.samples)
        plain, header, decode = 0.0, 0.0, 0.0
        for turn in repeats:
            plain = max(plain, decode_and_resize(folder / "llava", entries))
            header = max(header, prepare(folder / "llava", entries, folder / f"h{turn}", verify="header"))
            decode = max(decode, prepare(folder / "llava", entries, folder / f"d{turn}", verify="decode"))
        recipe = recipe_for(checkpoint, folder / "h0")
        ours = iter(our_loader(recipe, encoder_of(recipe), len(entries)))
        bare = bare_energon(recipe.data.dataset, encoder_of(recipe))
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        part = math.ceil(arguments.samples / 4)
        rate_of(ours, 4), rate_of(bare, 4)
        for _ in range(4 * arguments.repeats):
            rates["bare"].append(rate_of(bare, part))
            rates["ours"].append(rate_of(ours, part))
        loader, raw = max(rates["ours"]), max(rates["bare"])
        result = {
            "decode_and_resize_per_s": plain,
            "prepared_per_s": header,
            "prepared_ratio": header / plain,
            "prepared_with_verify_decode_ratio": decode / plain,
            "loader_per_s": loader,
            "bare_energon_per_s": raw,
            "loader_overhead": raw / loader - 1,
            "packing_real_fraction": packing_efficiency(),
            "packing_buffer_samples": packing_buffer_size(recipe.data),
            "memory": stream_memory(checkpoint, folder, encoder_of, arguments.stream),
        }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
