# SPDX-License-Identifier: Apache-2.0
"""Planned and measured memory of training steps, one fresh set of processes a case.

    python -m benchmarks.memory_plan                                   # the cases below that fit this machine's GPUs
    python -m benchmarks.memory_plan "--model qwen3_vl_4b --seq-length 4096 --images 4" "--model qwen2_5_vl_3b --tp 2"

A case takes the options of :mod:`benchmarks.gpu_step`. Each prints one JSON line, and the end a table: what
`qwen-harness plan` says (:mod:`models.contract.memory`) beside the allocator's peak over three steps on the fullest
rank. The plan's total holds an allowance for the runtime and for fragmentation on top of what is compared here.
"""

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from typing import Any

import torch
from torch import distributed

from benchmarks.gpu_step import case_parser, cut_layers, make_batches, make_recipe, one_step, synchronize
from models.contract.families import published_architecture
from models.contract.launcher import read_launcher_environment
from models.contract.memory import GIB, estimate_memory
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import start_megatron, stop_distributed

CASES = (
    "--model qwen3_vl_2b --seq-length 4096 --images 4",
    "--model qwen3_vl_2b --seq-length 8192 --images 4 --recompute full",
    "--model qwen3_vl_2b --seq-length 4096 --images 4 --precision-aware",
    "--model qwen3_vl_2b --seq-length 4096 --images 4 --offload 0.5",
    "--model qwen3_vl_2b --seq-length 4096 --images 4 --offload 1.0",
    "--model qwen2_5_vl_3b --seq-length 4096 --images 4",
    "--model qwen2_5_vl_3b --seq-length 8192 --images 4 --bf16-grads",
    "--model qwen3_vl_4b --seq-length 4096 --images 4",
    "--model qwen3_vl_30b_a3b --num-layers 4 --seq-length 4096 --images 4",
    "--model qwen2_5_vl_3b --seq-length 8192 --images 4 --tp 2",
    "--model qwen2_5_vl_3b --seq-length 8192 --images 4 --pp 2 --micro-batches 4",
    "--model qwen2_5_vl_7b --seq-length 8192 --images 4 --tp 2",
    "--model qwen3_vl_30b_a3b --num-layers 8 --seq-length 4096 --images 4 --ep 2",
)
"""Every term of the plan, with one and with two GPUs."""
RUN_CASE = "--run-case"


def num_processes(options: argparse.Namespace) -> int:
    """GPUs of a case: what its layout needs at least."""
    return max(options.tp * options.pp * options.cp, options.ep)


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """Plan one case and take three steps of it; the row on rank 0, None elsewhere."""
    architecture = cut_layers(published_architecture(options.model), options.num_layers)
    launcher = read_launcher_environment()
    recipe = make_recipe(options, launcher.world_size, architecture)
    plan = estimate_memory(recipe, architecture)
    ranks = start_megatron(recipe, launcher, timeout_s=300)
    try:
        engine = MegatronEngine(recipe, architecture, ranks, ())
        marks = {"weights": torch.cuda.memory_allocated()}
        engine.prepare()
        marks["prepared"] = torch.cuda.memory_allocated()
        batches = make_batches(options, architecture, ranks)
        for _ in range(3):
            one_step(engine, batches, options)
        synchronize()
        marks["between_steps"] = torch.cuda.memory_allocated()
        marks["peak"], marks["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        everyone: list[dict[str, int]] = [marks] * ranks.world_size
        distributed.all_gather_object(everyone, marks, group=ranks.control)
        if ranks.rank:
            return None
        fullest = max(everyone, key=lambda found: found["peak"])
        planned = {key: round(value / GIB, 2) for key, value in dataclasses.asdict(plan).items()}
        total = sum(planned.values())
        return {
            "case": shlex.join(sys.argv[2:]),
            "gpus": ranks.world_size,
            "planned_gib": planned,
            "planned_with_allowances_gib": round(plan.total / GIB, 2),
            "measured_gib": {key: round(value / GIB, 2) for key, value in fullest.items()},
            "planned_over_peak": round(total / (fullest["peak"] / GIB), 3),
            "device": torch.cuda.get_device_name(),
        }
    finally:
        stop_distributed()


def run_apart(case: str) -> dict[str, Any]:
    """Run one case in processes of its own."""
    processes = num_processes(case_parser().parse_args(shlex.split(case)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "benchmarks.memory_plan", RUN_CASE, *shlex.split(case),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        return {"case": case, "error": last_error(done.stderr)[:300]}
    return json.loads(rows[-1])


def last_error(text: str) -> str:
    """The last line that an exception begins, which the launcher's summary follows."""
    named = [line for line in text.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or text.strip().splitlines() or ["no output"])[-1]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row a case."""
    lines = ["| case | GPUs | planned GiB | peak GiB | planned / peak |", "|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| `{row['case']}` | | | | {row['error']} |")
        else:
            lines.append(
                f"| `{row['case']}` | {row['gpus']} | {sum(row['planned_gib'].values()):.1f} | "
                f"{row['measured_gib']['peak']:.1f} | {row['planned_over_peak']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run every case, or be one."""
    if sys.argv[1:2] == [RUN_CASE]:
        row = measure(case_parser().parse_args(sys.argv[2:]))
        if row is not None:
            print(json.dumps(row), flush=True)
        return
    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(f"{__doc__}\n{case_parser().format_usage()}")
    available = torch.cuda.device_count()
    if not available:
        sys.exit("memory can be measured on a CUDA device only")
    fitting = [
        case for case in CASES if num_processes(case_parser().parse_args(shlex.split(case))) <= available
    ]
    rows = []
    for case in sys.argv[1:] or fitting:
        rows.append(run_apart(case))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
