# SPDX-License-Identifier: Apache-2.0
"""What a launcher would have left beside a run, on a healthy machine and on one at fault."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.telemetry import telemetry_file
from models.contract.sentinel import MOMENTS, Sentinel, sentinel_file

NUM_SAMPLES = 60
"""A minute of training."""
DEVICE = "NVIDIA H200"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One device over a run."""

    matmul_tflops: tuple[float, float] = (790.0, 790.0)
    """Before and after."""
    throttled_samples: int = 0
    """In how many of the samples heat holds its clock down."""
    processes_before: int = 0
    foreign_processes: int = 0
    """In one sample."""
    ecc_errors: int = 0


HEALTHY = Machine()
MACHINE_FAULTS: dict[str, Machine] = {
    "device_throttled": Machine(throttled_samples=3),
    "device_taken": Machine(processes_before=1),
    "device_shared": Machine(foreign_processes=1),
    "memory_errors": Machine(ecc_errors=1),
    "slow_machine": Machine(matmul_tflops=(735.0, 735.0)),
    "slowed_machine": Machine(matmul_tflops=(815.0, 765.0)),
}


def write_machine(run_dir: Path, machine: Machine) -> Path:
    """Write telemetry and sentinels into a run directory."""
    head = {
        "index": 0, "name": DEVICE, "max_sm_clock_mhz": 1980, "power_limit_w": 700.0, "default_power_limit_w": 700.0,
        "processes_before": machine.processes_before, "ecc_errors_before": 0,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [{"devices": [head]}]
    for number in range(NUM_SAMPLES):
        is_hot = number >= NUM_SAMPLES - machine.throttled_samples
        is_last = number == NUM_SAMPLES - 1
        device = {
            "sm_clock_mhz": 1200 if is_hot else 1755, "memory_clock_mhz": 3201, "power_w": 690.0,
            "temperature_c": 88 if is_hot else 61, "utilization": 0.99, "memory_used_bytes": 2**36,
            "held_down_by": ["power cap", *(["hardware thermal"] if is_hot else [])],
            "foreign_processes": machine.foreign_processes if is_last else 0,
            "ecc_errors": machine.ecc_errors if is_last else 0,
        }  # fmt: skip
        rows.append({"time_s": float(number), "is_training": True, "devices": [device]})
    telemetry_file(run_dir).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for when, rate in zip(MOMENTS, machine.matmul_tflops, strict=True):
        Sentinel(
            started_at="2026-01-05T08:00:00+00:00", device_names=(DEVICE,), dtype="bfloat16", matmul_size=8192,
            matmul_tflops=(rate,), matmul_best_tflops=(rate,), all_reduce_bytes=0, all_reduce_gb_per_s=None,
        ).write(sentinel_file(run_dir, when))  # fmt: skip
    return run_dir
