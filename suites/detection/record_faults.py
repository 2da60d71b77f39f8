# SPDX-License-Identifier: Apache-2.0
"""Run directories as a wrong recorder would have left them, and baseline files as a wrong hand would."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.baselines.schema import content_id
from models.contract.record import METRICS_FILE, RUN_FILE, RunInfo

Row = dict[str, Any]
RECORD_FAULTS: dict[str, Callable[[list[Row], Row], list[Row]]] = {}
BASELINE_FAULTS: dict[str, Callable[[Row], None]] = {}
SPARSE_PEAK_TFLOPS = 1978.9
"""NVIDIA H200 with sparsity; the dense peak is half of it."""


def record_fault(change: Callable[[list[Row], Row], list[Row]]) -> Callable[[list[Row], Row], list[Row]]:
    """Enter a change of rows and run.json under its function's name."""
    RECORD_FAULTS[change.__name__] = change
    return change


def baseline_fault(change: Callable[[Row], None]) -> Callable[[Row], None]:
    """Enter a change of a baseline's data under its function's name."""
    BASELINE_FAULTS[change.__name__] = change
    return change


def write_faulty_record(source: Path, target: Path, fault: str) -> Path:
    """Copy a run directory's record, changed."""
    target.mkdir(parents=True)
    info = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (source / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    rows = RECORD_FAULTS[fault](rows, info)
    (target / RUN_FILE).write_text(json.dumps(info), encoding="utf-8")
    (target / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def write_faulty_baseline(source: Path, target: Path, fault: str) -> Path:
    """Copy a baseline's file, changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if fault == "torn_file":
        text = source.read_text(encoding="utf-8")
        target.write_text(text[: len(text) // 2], encoding="utf-8")
        return target
    data = json.loads(source.read_text(encoding="utf-8"))
    BASELINE_FAULTS[fault](data)
    target.write_text(json.dumps(data), encoding="utf-8")
    return target


def copy_record(source: Path, target: Path) -> Path:
    """Copy a run directory's record as it is."""
    target.mkdir(parents=True)
    for name in (RUN_FILE, METRICS_FILE):
        shutil.copy(source / name, target / name)
    return target


def _scaled(rows: list[Row], column: str, factor: float) -> list[Row]:
    return [{**row, column: row[column] * factor} for row in rows]


@record_fault
def tokens_times_8(rows: list[Row], info: Row) -> list[Row]:
    for column in ("num_padded_tokens", "num_real_tokens", "num_supervised_tokens"):
        rows = _scaled(rows, column, 8)
    return rows


@record_fault
def real_counts_padding(rows: list[Row], info: Row) -> list[Row]:
    return [{**row, "num_real_tokens": row["num_padded_tokens"]} for row in rows]


@record_fault
def ms_as_s(rows: list[Row], info: Row) -> list[Row]:
    return _scaled(rows, "step_time_ms", 1e-3)


@record_fault
def s_as_ms(rows: list[Row], info: Row) -> list[Row]:
    return _scaled(rows, "step_time_ms", 1e3)


@record_fault
def warmup_counted(rows: list[Row], info: Row) -> list[Row]:
    # A first step of a compiler's length, as on a device; then the running mean instead of the step.
    total, changed = 0.0, []
    for number, row in enumerate(rows, start=1):
        total += row["step_time_ms"] * (20.0 if number == 1 else 1.0)
        changed.append({**row, "step_time_ms": total / number})
    info["ended_at"] = None
    return changed


@record_fault
def sparse_peak(rows: list[Row], info: Row) -> list[Row]:
    info["hardware"] |= {"kind": "cuda", "device_name": "NVIDIA H200", "memory_bytes": 141 * 2**30}
    return [
        {**row, "extra": {"mfu": row["model_flops"] / row["step_time_ms"] * 1e-9 / SPARSE_PEAK_TFLOPS}}
        for row in rows
    ]


@record_fault
def one_device_for_eight(rows: list[Row], info: Row) -> list[Row]:
    info["world_size"] = 8
    return rows


@record_fault
def nan_dropped(rows: list[Row], info: Row) -> list[Row]:
    return [row for row in rows if row["iteration"] % 7]


@record_fault
def log_restarted(rows: list[Row], info: Row) -> list[Row]:
    middle = len(rows) // 2
    return rows[:middle] + rows[middle - 3 :]


@record_fault
def run_cut_short(rows: list[Row], info: Row) -> list[Row]:
    return rows[:-2]


@record_fault
def batch_size_off(rows: list[Row], info: Row) -> list[Row]:
    return _scaled(rows, "consumed_train_samples", 2)


@baseline_fault
def edited_loss(data: Row) -> None:
    data["runs"][0]["columns"]["lm_loss"][-1] *= 1.01


@baseline_fault
def edited_hardware(data: Row) -> None:
    data["key"]["hardware"] = "h100"


@baseline_fault
def nan_loss(data: Row) -> None:
    data["runs"][0]["columns"]["lm_loss"][0] = "nan"
    data["baseline_id"] = content_id(data)


@baseline_fault
def other_schema(data: Row) -> None:
    data["schema_version"] += 1
    data["baseline_id"] = content_id(data)


@baseline_fault
def other_recipe(data: Row) -> None:
    data["recipe"]["optimizer"]["lr"] *= 2
    data["key"]["recipe_sha"] = "0" * 16
    data["baseline_id"] = content_id(data)


def _slower_steps(rows: list[Row]) -> list[Row]:
    return _longer(rows, 1.08, first=1)


def _throttled(rows: list[Row]) -> list[Row]:
    return _longer(rows, 1.2, first=200)


def _longer(rows: list[Row], factor: float, *, first: int) -> list[Row]:
    times = ("step_time_ms", "data_time_ms", "forward_backward_time_ms", "optimizer_time_ms")
    return [
        row | {name: row[name] * factor for name in times} if row["iteration"] >= first else row
        for row in rows
    ]


def _clock_of(factor: float) -> Callable[[RunInfo], RunInfo]:
    """The run took longer by the clock as well."""

    def change(info: RunInfo) -> RunInfo:
        start = datetime.fromisoformat(info.started_at)
        end = start + (datetime.fromisoformat(info.ended_at or "") - start) * factor
        return info.model_copy(update={"ended_at": end.isoformat(timespec="seconds")})

    return change


SPEED_FAULTS: dict[str, tuple[Callable[[list[Row]], list[Row]], Callable[[RunInfo], RunInfo] | None]] = {
    "slower_steps": (_slower_steps, _clock_of(1.2)),
    "throttled": (_throttled, _clock_of(1.2)),
    "more_memory": (lambda rows: _scaled(rows, "peak_memory_bytes", 1.08), None),
}
