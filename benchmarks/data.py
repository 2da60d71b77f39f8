# SPDX-License-Identifier: Apache-2.0
"""Cost of the data path, as ratios within one run: ``python benchmarks/data.py CHECKPOINT [--samples 400]``.

prepare   samples a second against decoding and resizing the same images alone
loader    samples a second against bare energon with the same task encoder
packing   real tokens over padded tokens
memory    growth of this process while it loads, after the first tenth
"""

import argparse
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from megatron.energon import get_savable_loader
from megatron.energon.metadataset.loader_interface import LoadedDataset
from PIL import Image

from models.contract.families import detect_family, load_architecture, read_hf_config
from models.contract.recipe import Recipe, parse_recipe
from models.contract.site import Site
from models.datasets.encoder import make_encoder
from models.datasets.energon import ChatTaskEncoder, open_dataset, worker_config
from models.datasets.loader import BatchLoader, build_loader
from models.datasets.prepare.job import write_dataset
from models.datasets.prepare.llava import ConvertLlava
from models.datasets.prepare.source import open_source

SIDES = ((336, 336), (336, 500), (480, 640))


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


def recipe_for(checkpoint: Path, dataset: Path, *, packing: bool) -> Recipe:
    """One rank, one stream where packing asks for it."""
    return parse_recipe(
        {
            "name": "benchmark",
            "model": {"family": detect_family(read_hf_config(checkpoint)), "checkpoint": str(checkpoint)},
            "data": {"dataset": str(dataset), "seq_length": 8192, "packing": packing, "padding": "longest"},
            "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "optimizer": {"lr": 1e-4},
        },
        where="benchmark",
    )


def rate_of(stream: Iterable[Any], count: int) -> float:
    """Samples a second of an endless iterator, after one to warm up."""
    iterator = iter(stream)
    next(iterator)
    start = time.perf_counter()
    for _ in itertools.islice(iterator, count):
        pass
    return count / (time.perf_counter() - start)


def raw_rate(dataset: Path, encoder: ChatTaskEncoder, count: int) -> float:
    """Energon with a task encoder, without anything of ours around it."""
    config = worker_config(0, 1, 0, 1234)
    built = encoder.build_train_datasets(
        datasets=[LoadedDataset(dataset=open_dataset(str(dataset), "train", config, training=True))],
        worker_config=config, batch_size=None, shuffle_buffer_size=100,
    )  # fmt: skip
    return rate_of(
        get_savable_loader(built, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None), count
    )


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    architecture = load_architecture(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder, dataset = Path(name) / "llava", Path(name) / "dataset"
        entries = write_llava(folder, arguments.samples)
        plain = decode_and_resize(folder, entries)
        start = time.perf_counter()
        write_dataset(
            dataset, {"train": entries}, ConvertLlava(open_source(folder)), about={"source": "benchmark"}
        )
        prepared = len(entries) / (time.perf_counter() - start)

        def loader(*, packing: bool) -> BatchLoader:
            return build_loader(
                recipe_for(arguments.checkpoint, dataset, packing=packing), Site(), architecture,
                split="train", data_parallel_rank=0, data_parallel_size=1,
            )  # fmt: skip

        count = arguments.samples - 2
        ours = rate_of(loader(packing=False), count)
        data = recipe_for(arguments.checkpoint, dataset, packing=False).data
        bare = raw_rate(
            dataset,
            ChatTaskEncoder(make_encoder(data, architecture, arguments.checkpoint, cache_bytes=0)),
            count,
        )
        process, long = psutil.Process(), loader(packing=False)
        rate_of(long, count)
        before = process.memory_info().rss
        rate_of(long, 5 * count)
        growth = process.memory_info().rss - before
        packs = list(itertools.islice(loader(packing=True), 20))
        result = {
            "decode_and_resize_per_s": plain,
            "prepared_per_s": prepared,
            "prepared_ratio": prepared / plain,
            "loader_per_s": ours,
            "bare_energon_per_s": bare,
            "loader_ratio": ours / bare,
            "packing_real_fraction": sum(p.num_real_tokens for p in packs)
            / sum(p.input_ids.numel() for p in packs),
            "memory_growth_mib": growth / 2**20,
        }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
