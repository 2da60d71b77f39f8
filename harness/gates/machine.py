# SPDX-License-Identifier: Apache-2.0
"""Was the machine itself? A throttled, shared or slow device makes a time that says nothing of the code."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.records.machine import ALL_REDUCE, MATMUL, THROTTLES
from harness.verdict import GateResult

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline
    from harness.policy import Policy
    from harness.records.machine import DeviceTelemetry, MachineFacts
    from harness.records.record import RunRecord

RATES = {MATMUL: ("matrix product", "TFLOP/s"), ALL_REDUCE: ("all-reduce", "GB/s")}
"""What the sentinel measures, with its unit."""


def machine(
    record: RunRecord, baseline: Baseline | None, policy: Policy, *, hardware: str | None
) -> GateResult | None:
    """Invalid when devices were throttled, shared or faulty, or slower than before the run or than the baseline's.

    Args:
        record: The run.
        baseline: A baseline of the same hardware class, for its sentinel; None compares the run with itself only.
        policy: Limits.
        hardware: Class of the run. On a CPU, which is shared as a rule, nothing blocks.

    Returns: None when the record tells nothing of its machine, as foreign logs do.
    """
    facts = record.machine
    if not facts:
        return None
    faults = [*_device_faults(facts, policy), *_sentinel_faults(facts, baseline, policy)]
    remarks = [*facts.problems, *_remarks(facts)]
    blocks = hardware != "cpu"
    status = ("invalid" if blocks else "warn") if faults else "warn" if remarks else "pass"
    return GateResult(
        gate="machine",
        status=status,
        blocks=blocks,
        summary="; ".join([*faults, *remarks]) or _summary(facts),
        details={
            "is_at_fault": bool(faults),
            **facts.rates(),
            "throttled": max((device.throttled for device in facts.devices), default=None),
        },
    )


def _device_faults(facts: MachineFacts, policy: Policy) -> Iterator[str]:
    for device in facts.devices:
        if device.processes_before:
            yield f"device {device.name} was shared: {device.processes_before} process(es) before the run began"
        if device.foreign_processes:
            yield f"device {device.name} was shared: {device.foreign_processes} process(es) of others"
        if device.throttled > policy.machine.max_throttled_share:
            reasons = ", ".join(f"{name} {share:.1%}" for name, share in _throttles(device))
            yield f"device {device.name} was throttled in {device.throttled:.1%} of the time: {reasons}"
        if device.ecc_errors > 0:
            yield f"device {device.name} had {device.ecc_errors} uncorrected memory error(s)"


def _sentinel_faults(facts: MachineFacts, baseline: Baseline | None, policy: Policy) -> Iterator[str]:
    margin = policy.machine.sentinel_margin
    before, after = facts.sentinels.get("before"), facts.sentinels.get("after")
    if before is not None and after is not None:
        change = after.slowest_tflops / before.slowest_tflops - 1.0
        if change < -margin:
            yield (
                f"the matrix product went from {before.slowest_tflops:.4g} to {after.slowest_tflops:.4g} TFLOP/s "
                f"({change:+.1%}) during the run"
            )
    for key, ours in facts.rates().items():
        theirs = baseline_rate(baseline, key)
        if theirs is not None and ours / theirs - 1.0 < -margin:
            what, unit = RATES[key]
            yield (
                f"a slow machine: {what} {ours:.4g} {unit}, on the baseline's {theirs:.4g} "
                f"({ours / theirs - 1.0:+.1%})"
            )


def baseline_rate(baseline: Baseline | None, key: str) -> float | None:
    """One rate of the baseline's machine: the middle one of its runs; None where none measured it."""
    found = [run.machine[key] for run in baseline.runs if run.machine.get(key)] if baseline else []
    return statistics.median(found) if found else None


def _remarks(facts: MachineFacts) -> Iterator[str]:
    for device in facts.devices:
        if device.power_limit_w < device.default_power_limit_w:
            yield (
                f"device {device.name} is limited to {device.power_limit_w:.0f} of "
                f"{device.default_power_limit_w:.0f} W"
            )
        if not device.num_samples:
            yield f"device {device.name} was not seen while it trained: the run was too short"


def _throttles(device: DeviceTelemetry) -> list[tuple[str, float]]:
    return [(name, share) for name, share in device.held_down.items() if name in THROTTLES]


def _summary(facts: MachineFacts) -> str:
    parts = [f"{RATES[key][0]} {rate:.4g} {RATES[key][1]}" for key, rate in facts.rates().items()]
    clocks = [device.median("sm_clock_mhz") for device in facts.devices]
    if any(map(math.isfinite, clocks)):
        parts.append(f"clock {min(clocks):.0f} MHz, not throttled, not shared")
    return ", ".join(parts)
