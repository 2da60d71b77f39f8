# SPDX-License-Identifier: Apache-2.0
"""Rate of converting a checkpoint of a published size with random weights, against `cp` of the same bytes.

    python -m benchmarks.conversion --folder /scratch --size qwen2_5_vl_3b

Writes about four times the size of the checkpoint into `--folder` and removes it afterwards. `cp` and both directions
take turns, `--repeats` times each, and medians and bests are compared: the same `cp` varies by more than a factor of
two on a virtual machine. Both directions run in a process of their own; peak memory is what the kernel says, its
workers' added up as if they shared nothing. Before each run what it reads lies in the page cache and nothing else of
ours does, so that work on the same bytes is compared and not the disk's mood. Figures mean something on a machine that
does nothing else: conversion writes, reads back and compares with two processes, `cp` copies with one. The published
bridges cannot be timed beside it on a CPU: mcore-bridge 1.6.5 and megatron-bridge 0.6.2 import TransformerEngine before
anything else.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from models.common.weight_rules import Shape
from models.contract.families import load_architecture
from models.conversion.tiny import checkpoint_shapes, write_shards

PUBLISHED = Path(__file__).parents[1] / "models" / "contract" / "published"
REPOSITORY = Path(__file__).parents[1]
logger = logging.getLogger("conversion")

CHILD = """
import os, re, resource, sys, time
from models.entry.convert import main
started = time.monotonic()
code = main(sys.argv[2:])
seconds = time.monotonic() - started
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(code, seconds, (own + int(sys.argv[1]) * largest_worker) * 1024, sum(os.times()[:4]))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run; processor time and memory with its workers'."""

    seconds: float
    cpu_s: float
    peak_bytes: int = 0


def make_checkpoint(folder: Path, size: str, num_layers: int | None) -> int:
    """Write a checkpoint with random weights; returns its bytes."""
    folder.mkdir()
    config = json.loads((PUBLISHED / f"{size}.json").read_text(encoding="utf-8"))
    if num_layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**22 + 1, generator=generator).to(torch.bfloat16)

    def fill(name: str, shape: Shape) -> torch.Tensor:
        del name
        count = torch.Size(shape).numel()
        return noise.repeat(count // noise.numel() + 1)[:count].reshape(shape).clone()

    shapes = checkpoint_shapes(load_architecture(folder))
    write_shards(
        folder,
        shapes,
        fill,
        max(2, sum(torch.Size(shape).numel() for shape in shapes.values()) // 2_000_000_000),
    )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def cache_only(kept: Path, root: Path) -> None:
    """Write back everything, then leave the files under `kept` in the page cache and drop the others under `root`."""
    os.sync()
    for file in (path for path in root.rglob("*") if path.is_file()):
        with file.open("rb", buffering=0) as stream:
            if kept in file.parents:
                while stream.read(2**24):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_copy(source: Path, target: Path) -> Run:
    """Time `cp -r`."""
    cache_only(source, source.parent)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    elapsed, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def time_conversion(direction: str, source: Path, target: Path, workers: int, *arguments: str) -> Run:
    """Time one conversion in a process of its own."""
    cache_only(source, source.parent)
    command = [direction, str(source), str(target), "--workers", str(workers), *arguments]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(workers), *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    code, seconds, peak, cpu = done.stdout.strip().splitlines()[-1].split()
    if code != "0":
        raise SystemExit(done.stderr)
    return Run(float(seconds), float(cpu), int(peak))


def measure(root: Path, source: Path, workers: int, repeats: int) -> tuple[dict[str, list[Run]], bool]:
    """Runs of `cp` and of both directions in turns, and whether every round trip gave the same files."""
    runs: dict[str, list[Run]] = {"cp": [], "hf_to_megatron": [], "megatron_to_hf": []}
    copy, middle, back, same = root / "copy", root / "m", root / "back", True
    for _ in range(repeats):
        runs["cp"].append(time_copy(source, copy))
        shutil.rmtree(copy)
        runs["hf_to_megatron"].append(time_conversion("hf-to-megatron", source, middle, workers))
        runs["megatron_to_hf"].append(
            time_conversion("megatron-to-hf", middle, back, workers, "--hf", str(source))
        )
        same &= subprocess.run(["diff", "-rq", str(source), str(back)], check=False).returncode == 0
        shutil.rmtree(middle)
        shutil.rmtree(back)
    return runs, same


def summarize(runs: list[Run], copies: list[Run]) -> dict[str, Any]:
    """Median and best of some runs, and as rates relative to those of `cp`."""
    seconds, reference = [run.seconds for run in runs], [run.seconds for run in copies]
    return {
        "seconds": seconds, "median_s": median(seconds), "best_s": min(seconds),
        "median_ratio_to_cp": median(reference) / median(seconds), "best_ratio_to_cp": min(reference) / min(seconds),
        "peak_bytes": max(run.peak_bytes for run in runs), "cpu_s": median(run.cpu_s for run in runs),
    }  # fmt: skip


def main() -> None:
    """Run and log one line for `cp` and for each direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder on the disk to measure")
    parser.add_argument("--size", default="qwen2_5_vl_3b", help="published config")
    parser.add_argument("--num-layers", type=int, help="cut the decoder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        num_bytes = make_checkpoint(root / "hf", options.size, options.num_layers)
        runs, same = measure(root, root / "hf", options.workers, options.repeats)
    result: dict[str, Any] = {
        "size": options.size, "num_bytes": num_bytes, "workers": options.workers,
        "load_average": os.getloadavg()[0], "round_trip_is_equal": same,
    }  # fmt: skip
    for name, some in runs.items():
        result[name] = row = summarize(some, runs["cp"])
        logger.info(
            "%s: median %.1f s, best %.1f s, %.0f MB/s; %.0f%% of cp's rate by medians, %.0f%% by bests; "
            "peak %.2f GB, %.1f s of processor time",
            name, row["median_s"], row["best_s"], num_bytes / row["median_s"] / 1e6, 100 * row["median_ratio_to_cp"],
            100 * row["best_ratio_to_cp"], row["peak_bytes"] / 1e9, row["cpu_s"],
        )  # fmt: skip
    logger.info("%.2f GB; round trip equal: %s", num_bytes / 1e9, same)
    logger.info("load of the machine at the end: %.1f on %d cores", os.getloadavg()[0], os.cpu_count() or 1)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logger.info("(making the checkpoint took %.2f GB in this process)", own / 1e9)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
