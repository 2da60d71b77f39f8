# SPDX-License-Identifier: Apache-2.0
"""Run directories of a fine-tune that never ran: known noise, known effect. For testing gates, never for baselines."""

import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from harness.gates.sanity import planned_learning_rate
from models.contract.recipe import Recipe, parse_recipe
from models.contract.record import (
    METRICS_FILE,
    RunInfo,
    RunOutcome,
    StepMetrics,
    to_json_number,
    write_run_info,
)

Row = dict[str, Any]

GLOBAL_BATCH_SIZE = 8
SEQ_LENGTH = 96
MEGATRON_FLOPS_PER_TOKEN = 3.1e6
STARTED = datetime(2026, 1, 5, 8, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticRun:
    """What one synthetic run is made of."""

    data_seed: int = 1
    """Two runs with the same data seed saw the same batches."""
    run_seed: int = 1
    train_iters: int = 500
    batch_noise: float = 0.036
    """sd of ln(lm_loss) from which samples are in a batch."""
    paired_noise: float = 0.003
    """sd of ln(lm_loss) between two runs on the same batch."""
    run_offset: float = 0.001
    """sd of a run's shift of the end of the curve."""
    step_time_ms: float = 120.0
    host_factor: float = 1.0
    """Speed of the host: multiplies every step time."""
    hardware: str = "cpu"
    device_name: str = "Model CPU"
    commit: str = "0123abcd"
    is_dirty: bool | None = False
    """None: the run does not say."""
    torch_version: str = "2.11.0"


def recipe_of(run: SyntheticRun) -> Recipe:
    """The recipe that a synthetic run claims to have followed."""
    data = {
        "name": "synthetic",
        "num_processes": 1,
        "model": {"family": "qwen2_5_vl", "checkpoint": "tiny"},
        "data": {"dataset": "scenes", "seq_length": SEQ_LENGTH},
        "train": {
            "train_iters": run.train_iters,
            "micro_batch_size": 1,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "seed": run.data_seed,
        },
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": min(20, run.train_iters - 1)},
    }
    return parse_recipe(data, where="synthetic recipe")


def write_synthetic_run(
    directory: Path,
    run: SyntheticRun,
    *,
    change_rows: Callable[[list[Row]], list[Row]] | None = None,
    change_info: Callable[[RunInfo], RunInfo] | None = None,
) -> Path:
    """Write a run directory.

    Args:
        directory: Made if need be.
        run: What to write.
        change_rows: A fault: takes the rows of ``metrics.jsonl``, returns those to write.
        change_info: A fault of ``run.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = [dict(row) for row in synthetic_rows(run)]
    rows = change_rows(rows) if change_rows else rows
    lines = [json.dumps(to_json_number(row)) + "\n" for row in rows]
    (directory / METRICS_FILE).write_text("".join(lines), encoding="utf-8")
    info = _info(run)
    write_run_info(directory, change_info(info) if change_info else info)
    return directory


@functools.lru_cache(maxsize=64)
def synthetic_rows(run: SyntheticRun) -> tuple[Row, ...]:
    """Rows of ``metrics.jsonl``: a falling loss with batch noise shared by runs of one data seed."""
    recipe = recipe_of(run)
    batches = random.Random(run.data_seed)
    noise = random.Random(f"{run.data_seed}-{run.run_seed}")
    offset = noise.gauss(0.0, run.run_offset)
    rows: list[Row] = []
    for iteration in range(1, run.train_iters + 1):
        progress = min(iteration / 50.0, 1.0)
        level = 1.6 + 4.0 * 0.985**iteration
        spread = batches.gauss(0.0, run.batch_noise) + progress * noise.gauss(offset, run.paired_noise)
        real = batches.randint(400, 600)
        warmup = 8.0 if iteration == 1 else 1.0
        step_time = run.step_time_ms * run.host_factor * warmup * (1.0 + abs(noise.gauss(0.0, 0.01)))
        padded = GLOBAL_BATCH_SIZE * SEQ_LENGTH
        step = StepMetrics(
            iteration=iteration,
            consumed_train_samples=iteration * GLOBAL_BATCH_SIZE,
            lm_loss=level * (1.0 + spread),
            grad_norm=level * (1.0 + batches.gauss(0.0, 0.05)) * (1.0 + progress * noise.gauss(0.0, 0.005)),
            learning_rate=planned_learning_rate(recipe, iteration - 1),
            global_batch_size=GLOBAL_BATCH_SIZE,
            step_time_ms=step_time,
            data_time_ms=step_time * 0.05,
            forward_backward_time_ms=step_time * 0.8,
            optimizer_time_ms=step_time * 0.1,
            num_padded_tokens=padded,
            num_real_tokens=real,
            num_supervised_tokens=real // 3,
            num_vision_tokens=real // 4,
            num_images=GLOBAL_BATCH_SIZE,
            peak_memory_bytes=int(8e8),
            sample_digest=hashlib.sha256(f"{run.data_seed}-{iteration}".encode()).hexdigest()[:16],
            megatron_flops=MEGATRON_FLOPS_PER_TOKEN * padded,
            model_flops=MEGATRON_FLOPS_PER_TOKEN * real * 1.2,
            eval_lm_loss=1.62 * (1.0 + noise.gauss(0.0, 0.002)) if iteration == run.train_iters else None,
        )
        rows.append(step.model_dump(mode="json"))
    return tuple(rows)


def _info(run: SyntheticRun) -> RunInfo:
    recipe = recipe_of(run)
    seconds = sum(row["step_time_ms"] for row in synthetic_rows(run)) / 1000.0 + 5.0
    is_cpu = run.hardware == "cpu"
    hardware = {
        "kind": "cpu" if is_cpu else "cuda",
        "device_name": run.device_name,
        "cpu_model": run.device_name if is_cpu else "Model CPU",
        "device_count": 0 if is_cpu else 1,
        "memory_bytes": 64 * 2**30,
    }
    return RunInfo(
        run_id=f"synthetic-{run.data_seed}-{run.run_seed}",
        recipe=recipe.model_dump(mode="json"),
        recipe_sha=recipe.sha(),
        family=recipe.model.family,
        command=["train"],
        started_at=STARTED.isoformat(timespec="seconds"),
        ended_at=(STARTED + timedelta(seconds=seconds)).isoformat(timespec="seconds"),
        world_size=1,
        hardware=hardware,
        environment={"commit": run.commit, "packages": {"torch": run.torch_version}}
        | ({} if run.is_dirty is None else {"dirty": run.is_dirty}),
        checkpoint_fingerprint="c0ffee",
        dataset_fingerprint=f"d{run.data_seed}",
        data_order_digest=hashlib.sha256(f"order-{run.data_seed}".encode()).hexdigest(),
        sample_counts={"consumed": run.train_iters * GLOBAL_BATCH_SIZE, "skipped": 0},
        outcome=RunOutcome(status="completed", iteration=run.train_iters, phase="done"),
    )
