# SPDX-License-Identifier: Apache-2.0
"""Rate of converting a checkpoint of a published size with random weights, against `cp` of the same bytes.

    python -m benchmarks.conversion --folder /scratch --size qwen2_5_vl_3b --peer /venvs/mcore-bridge/bin/python

Needs three times the size of the checkpoint in `--folder` and removes it afterwards. `cp` and both directions take
turns in an order that changes from round to round, and each is compared with the `cp` of its own round: the same `cp`
varies by more than a factor of two on a virtual machine. What is alike for all three, before every run: what it reads
lies in the page cache and nothing else of ours does; nothing waits to be written to the disk; and as much memory as it
will write was touched a moment before, since a virtual machine's host hands out memory slowly the first time. None of
them waits for the disk at its end (no fsync), and what was written is removed before it all reaches the disk, so that
a disk that allows short bursts only treats all alike. Both directions run in a process of their own; peak memory is
what the kernel says, its workers' added up as if they shared nothing. Time of the processor is printed as well: it
stays meaningful on a machine that does something else. Conversion writes, reads back, hashes and compares with several
processes, `cp` copies with one.

`--peer` names the interpreter of a virtual environment that has mcore-bridge or megatron-bridge; its import of the same
checkpoint is timed, or why it does not run on this machine is said, in its own words.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
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


TOUCH = """
import mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
block = b"\\1" * 2**20
for start in range(0, size, len(block)):
    memory[start:start + len(block)] = block[:size - start]
"""


def settle(kept: Path, root: Path) -> None:
    """Make the state that every run starts from: only the files under `kept` in the page cache, memory touched."""
    os.sync()
    size = 0
    for file in (path for path in root.rglob("*") if path.is_file()):
        with file.open("rb", buffering=0) as stream:
            if kept in file.parents:
                size += file.stat().st_size
                while stream.read(2**24):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    subprocess.run([sys.executable, "-c", TOUCH, str(size)], check=True)


def time_copy(source: Path, target: Path) -> Run:
    """Time `cp -r`."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    elapsed, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def time_conversion(direction: str, source: Path, target: Path, workers: int, *arguments: str) -> Run:
    """Time one conversion in a process of its own."""
    command = [direction, str(source), str(target), "--workers", str(workers), *arguments]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(workers), *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    code, *figures = (done.stdout.strip().splitlines() or ["1"])[-1].split()
    if done.returncode or code != "0":
        raise SystemExit(f"{direction} failed:\n{done.stderr}")
    seconds, peak, cpu = figures
    return Run(float(seconds), float(cpu), int(peak))


def measure(root: Path, source: Path, workers: int, repeats: int) -> tuple[dict[str, list[Run]], bool]:
    """Runs of `cp` and of both directions in turns, and whether every round trip gave the same files."""
    middle, out, same = root / "megatron", root / "out", True
    time_conversion(
        "hf-to-megatron", source, middle, workers
    )  # what the way back reads; also warms everything up
    actions: dict[str, tuple[Path, Callable[[], Run]]] = {
        "cp": (source, lambda: time_copy(source, out)),
        "hf_to_megatron": (source, lambda: time_conversion("hf-to-megatron", source, out, workers)),
        "megatron_to_hf": (
            middle,
            lambda: time_conversion("megatron-to-hf", middle, out, workers, "--hf", str(source)),
        ),
    }
    runs: dict[str, list[Run]] = {name: [] for name in actions}
    order = list(actions)
    for _ in range(repeats):
        for name in order:
            kept, action = actions[name]
            settle(kept, root)
            runs[name].append(action())
            reference = middle if name == "hf_to_megatron" else source
            same &= subprocess.run(["diff", "-rq", str(reference), str(out)], check=False).returncode == 0
            shutil.rmtree(out)
        order = order[1:] + order[:1]
    return runs, same


PEER = """
import os, resource, sys, time
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
source, target = sys.argv[1:]
try:
    import mcore_bridge
except ModuleNotFoundError as error:
    if error.name != "mcore_bridge":
        raise
    from megatron.bridge import AutoBridge

    started = time.monotonic()
    AutoBridge.import_ckpt(source, target)
else:
    import torch
    from megatron.core import mpu
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from transformers import AutoConfig

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    started = time.monotonic()
    config = ModelConfig(
        params_dtype=torch.bfloat16, **hf_to_mcore_config(AutoConfig.from_pretrained(source))
    )
    config.bridge.load_weights(get_mcore_model(config), source)  # into memory; it writes no Megatron checkpoint
print(time.monotonic() - started, sum(os.times()[:2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
"""As the projects' own READMEs do it."""


def time_peer(python: Path, source: Path, target: Path) -> Run | str:
    """Time a published bridge's import of the checkpoint, or say why it does not run here."""
    command = [str(python), "-W", "ignore", "-c", PEER, str(source), str(target)]
    with (
        tempfile.TemporaryDirectory() as elsewhere
    ):  # not in the repository, whose packages would be found first
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    seconds, cpu, peak = done.stdout.strip().splitlines()[-1].split()
    return Run(float(seconds), float(cpu), int(peak))


def summarize(runs: list[Run], copies: list[Run]) -> dict[str, Any]:
    """Median and spread of some runs, and of their rates relative to the `cp` of the same round."""
    seconds = [run.seconds for run in runs]
    ratios = [copy.seconds / run.seconds for copy, run in zip(copies, runs, strict=True)]
    return {
        "seconds": seconds, "median_s": median(seconds), "best_s": min(seconds), "worst_s": max(seconds),
        "ratios_to_cp": ratios, "median_ratio_to_cp": median(ratios),
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
    parser.add_argument(
        "--peer", type=Path, help="interpreter of an environment with mcore-bridge or megatron-bridge"
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        num_bytes = make_checkpoint(root / "hf", options.size, options.num_layers)
        runs, same = measure(root, root / "hf", options.workers, options.repeats)
        peer = time_peer(options.peer, root / "hf", root / "peer") if options.peer else None
    result: dict[str, Any] = {
        "size": options.size, "num_bytes": num_bytes, "workers": options.workers,
        "load_average": os.getloadavg()[0], "round_trip_is_equal": same,
    }  # fmt: skip
    for name, some in runs.items():
        result[name] = row = summarize(some, runs["cp"])
        logger.info(
            "%s: median %.1f s (%.1f to %.1f), %.0f MB/s; %.0f%% of the rate of its round's cp (%.0f to %.0f%%); "
            "peak %.2f GB, %.1f s of processor time",
            name, row["median_s"], row["best_s"], row["worst_s"], num_bytes / row["median_s"] / 1e6,
            100 * row["median_ratio_to_cp"], 100 * min(row["ratios_to_cp"]), 100 * max(row["ratios_to_cp"]),
            row["peak_bytes"] / 1e9, row["cpu_s"],
        )  # fmt: skip
    if isinstance(peer, Run):
        result["peer"] = asdict(peer)
        logger.info(
            "peer: %.1f s, %.0f MB/s, peak %.2f GB",
            peer.seconds,
            num_bytes / peer.seconds / 1e6,
            peer.peak_bytes / 1e9,
        )
    else:
        result["peer"] = peer
        logger.info("peer: %s", f"does not run here: {peer}" if peer else "not asked for (--peer)")
    logger.info("%.2f GB; round trip equal: %s", num_bytes / 1e9, same)
    logger.info("load of the machine at the end: %.1f on %d cores", os.getloadavg()[0], os.cpu_count() or 1)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logger.info("(making the checkpoint took %.2f GB in this process)", own / 1e9)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
