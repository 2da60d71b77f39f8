# SPDX-License-Identifier: Apache-2.0
"""What is known of the machine a run ran on: what its devices did, and what it could do before and after."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.contract.errors import RunError
from models.contract.sentinel import MOMENTS, Sentinel, When, sentinel_file

THROTTLES = ("hardware slowdown", "software thermal", "hardware thermal", "power brake")
"""What holds a clock down because something is wrong. A power cap is how a loaded device runs."""
MATMUL, ALL_REDUCE = "sentinel_matmul_tflops", "sentinel_all_reduce_gb_per_s"
SAMPLE_KEYS = ("sm_clock_mhz", "power_w", "temperature_c", "utilization")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTelemetry:
    """One device over the training part of a run. Numbers are nan where the device does not offer them."""

    name: str
    """Node, index and name."""
    num_samples: int
    times_s: tuple[float, ...]
    """Since the run's first sample."""
    series: dict[str, tuple[float, ...]]
    """By SAMPLE_KEYS; utilization is a share."""
    held_down: dict[str, float]
    """Share of the samples in which something held the clocks down, by what."""
    throttled: float
    """Share of the samples with a reason of THROTTLES."""
    max_sm_clock_mhz: float
    power_limit_w: float
    default_power_limit_w: float
    processes_before: int
    """Processes on the device before the run began."""
    foreign_processes: int
    """Most processes of others at one time while it trained."""
    ecc_errors: int
    """Uncorrected memory errors during the run."""

    def median(self, key: str) -> float:
        """Middle value of a column; nan without one."""
        values = [value for value in self.series[key] if math.isfinite(value)]
        return statistics.median(values) if values else math.nan

    def largest(self, key: str) -> float:
        """Largest value of a column; nan without one."""
        return max((value for value in self.series[key] if math.isfinite(value)), default=math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """Telemetry by device, sentinel by moment, and what could not be read."""

    devices: tuple[DeviceTelemetry, ...] = ()
    sentinels: dict[When, Sentinel] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.devices or self.sentinels or self.problems)

    def rates(self) -> dict[str, float]:
        """What the sentinel measured, by name: what a baseline keeps of a machine."""
        found = {MATMUL: self.matmul_tflops, ALL_REDUCE: self.all_reduce_gb_per_s}
        return {name: rate for name, rate in found.items() if rate is not None}

    @property
    def ceiling_tflops(self) -> float | None:
        """What this run's rates are held to: the fastest product that any device did, before or after."""
        return max((max(found.matmul_best_tflops) for found in self.sentinels.values()), default=None)

    @property
    def matmul_tflops(self) -> float | None:
        """What the slowest device keeps up, mean of before and after."""
        rates = [sentinel.slowest_tflops for sentinel in self.sentinels.values()]
        return statistics.fmean(rates) if rates else None

    @property
    def all_reduce_gb_per_s(self) -> float | None:
        """Bus bandwidth, mean of before and after."""
        found = [sentinel.all_reduce_gb_per_s for sentinel in self.sentinels.values()]
        rates = [rate for rate in found if rate is not None]
        return statistics.fmean(rates) if rates else None


def read_machine(run_dir: Path) -> MachineFacts:
    """Read what the launcher left in a run directory; empty when it left nothing."""
    problems: list[str] = []
    sentinels: dict[When, Sentinel] = {}
    for when in MOMENTS:
        file = sentinel_file(run_dir, when)
        if file.is_file():
            try:
                sentinels[when] = Sentinel.read(file)
            except RunError as error:
                problems.append(f"{error.what}: {file.name}")
    devices: list[DeviceTelemetry] = []
    for file in sorted(run_dir.glob("telemetry*.jsonl")):
        found = _read_telemetry(file)
        if found is None:
            problems.append(f"telemetry cannot be read: {file.name}")
        else:
            devices += found
    return MachineFacts(devices=tuple(devices), sentinels=sentinels, problems=tuple(problems))


def _read_telemetry(file: Path) -> list[DeviceTelemetry] | None:
    """Devices of one file; None when it is not what the sampler writes. A torn last line is left out."""
    node = file.stem.removeprefix("telemetry").removeprefix("-node-")
    try:
        head, *samples = _lines(file)
        devices = head["devices"]
        training = [row for row in samples if row["is_training"]]
        start = samples[0]["time_s"] if samples else 0.0
        return [
            _device(
                f"{node}:" if node else "",
                facts,
                [(row["time_s"] - start, row["devices"][n]) for row in training],
            )
            for n, facts in enumerate(devices)
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _device(
    prefix: str, facts: dict[str, Any], samples: list[tuple[float, dict[str, Any]]]
) -> DeviceTelemetry:
    rows = [row for _, row in samples]
    reasons = [set(row["held_down_by"]) for row in rows if row["held_down_by"] is not None]
    names = sorted({name for found in reasons for name in found})
    ecc = [row["ecc_errors"] for row in rows if row["ecc_errors"] is not None]
    return DeviceTelemetry(
        name=f"{prefix}{facts['index']} {facts['name']}",
        num_samples=len(rows),
        times_s=tuple(float(time) for time, _ in samples),
        series={key: tuple(_number(row[key]) for row in rows) for key in SAMPLE_KEYS},
        held_down={name: sum(name in found for found in reasons) / len(reasons) for name in names},
        throttled=sum(bool(found & set(THROTTLES)) for found in reasons) / max(len(reasons), 1),
        max_sm_clock_mhz=_number(facts["max_sm_clock_mhz"]),
        power_limit_w=_number(facts["power_limit_w"]),
        default_power_limit_w=_number(facts["default_power_limit_w"]),
        processes_before=facts["processes_before"] or 0,
        foreign_processes=max((row["foreign_processes"] or 0 for row in rows), default=0),
        ecc_errors=max(ecc, default=0) - (facts["ecc_errors_before"] or 0) if ecc else 0,
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
