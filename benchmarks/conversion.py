# SPDX-License-Identifier: Apache-2.0
"""Rate of converting a checkpoint of a published size with random weights, against `cp` of the same bytes.

    python -m benchmarks.conversion --folder /scratch --size qwen2_5_vl_3b

Writes about four times the size of the checkpoint into `--folder` and removes it afterwards. Both directions run in a
process of their own, whose peak memory is what the kernel says. Before each run what it reads lies in the page cache
and nothing else of ours does, so that work on the same bytes is compared and not the disk's mood; `cp` runs before and
after, and the faster one counts. Figures mean something on a machine that does nothing else: conversion writes, reads
back and compares with two threads, `cp` copies with one. The published bridges cannot be timed beside it on a CPU:
mcore-bridge 1.6.5 and megatron-bridge 0.6.2 import TransformerEngine before anything else.
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
from pathlib import Path

import torch

from models.common.weight_rules import Shape
from models.contract.families import load_architecture
from models.conversion.tiny import checkpoint_shapes, write_shards

PUBLISHED = Path(__file__).parents[1] / "models" / "contract" / "published"
REPOSITORY = Path(__file__).parents[1]
logger = logging.getLogger("conversion")

CHILD = """
import re, sys, time
from models.entry.convert import main
started = time.monotonic()
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)
print(code, time.monotonic() - started, int(peak) * 1024, time.process_time())
"""


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


def time_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds that `cp -r` takes, and its processor time."""
    cache_only(source, source.parent)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    elapsed, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(target)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_conversion(direction: str, source: Path, *arguments: str) -> tuple[float, int, float]:
    """Seconds, peak bytes of memory and processor time of one conversion in a process of its own."""
    cache_only(source, source.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, direction, str(source), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    code, seconds, peak, cpu = done.stdout.strip().splitlines()[-1].split()
    if code != "0":
        raise SystemExit(done.stderr)
    return float(seconds), int(peak), float(cpu)


def main() -> None:
    """Run and log one line for each direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder on the disk to measure")
    parser.add_argument("--size", default="qwen2_5_vl_3b", help="published config")
    parser.add_argument("--num-layers", type=int, help="cut the decoder")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        source = root / "hf"
        num_bytes = make_checkpoint(source, options.size, options.num_layers)
        copies = [time_copy(source, root / "copy") for _ in range(2)]
        there = run_conversion("hf-to-megatron", source, str(root / "m"), "--workers", options.workers)
        back = run_conversion(
            "megatron-to-hf",
            root / "m",
            str(root / "back"),
            "--hf",
            str(source),
            "--workers",
            options.workers,
        )
        shutil.rmtree(root / "m")
        same = subprocess.run(["diff", "-rq", str(source), str(root / "back")], check=False).returncode == 0
        shutil.rmtree(root / "back")
        copies.append(time_copy(source, root / "copy"))
    copy_s, copy_cpu = (min(column) for column in zip(*copies, strict=True))
    result = {
        "size": options.size, "num_bytes": num_bytes, "copy_s": [seconds for seconds, _ in copies],
        "copy_cpu_s": copy_cpu, "load_average": os.getloadavg()[0], "round_trip_is_equal": same,
    }  # fmt: skip
    for name, (seconds, peak, cpu) in (("hf_to_megatron", there), ("megatron_to_hf", back)):
        result[name] = {
            "seconds": seconds, "ratio_to_cp": copy_s / seconds, "peak_bytes": peak, "cpu_s": cpu
        }  # fmt: skip
        logger.info(
            "%s: %.1f s, %.0f MB/s, %.0f%% of cp's rate, peak %.2f GB, %.1f s of processor time",
            name, seconds, num_bytes / seconds / 1e6, 100 * copy_s / seconds, peak / 1e9, cpu,
        )  # fmt: skip
    logger.info(
        "cp: %s s for %.2f GB, %.1f s of processor time; round trip equal: %s",
        [round(seconds, 1) for seconds, _ in copies], num_bytes / 1e9, copy_cpu, same,
    )  # fmt: skip
    logger.info("load of the machine at the end: %.1f on %d cores", os.getloadavg()[0], os.cpu_count() or 1)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logger.info("(making the checkpoint took %.2f GB in this process)", own / 1e9)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
