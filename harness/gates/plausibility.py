# SPDX-License-Identifier: Apache-2.0
"""What cannot be: rates beyond the device's peak, more real tokens than padded ones, times that do not add up.

A mistaken unit (milliseconds for seconds, one GPU for eight, sparse for dense peak) shows here, not as a change.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.devices import HARDWARE, HardwareClass
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS
from harness.verdict import GateResult
from models.contract.flops import tflops_per_gpu

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline
    from harness.policy import Policy
    from harness.records.record import RunRecord

CLOCK_SLACK_SECONDS = 3.0
PARTS = ("data_time_ms", "forward_backward_time_ms", "optimizer_time_ms")
PARTS_SLACK = 1.02
PARTS_SHARE = 0.95
"""The three parts of a step make up at least this much of it, in nine steps of ten."""


def plausibility(
    record: RunRecord, policy: Policy, *, hardware: str | None, baseline: Baseline | None = None
) -> GateResult:
    """Check a record against arithmetic, the clock, the recipe and the device it claims.

    Args:
        record: The run.
        policy: Supplies limits of utilisation and rounding.
        hardware: Class the run is said to be from; None when nobody says.
        baseline: Baseline on the same hardware class, for the size of its step time.
    """
    details: dict[str, Any] = {}
    faults = _tokens(record) + _times(record) + _wall_clock(record)
    warnings: list[str] = []
    faults += _rates(record, policy, details)
    if baseline is not None:
        faults += _time_ratio(record, baseline, policy, hardware)
    device = HARDWARE.get(hardware or "")
    if device is not None:
        more_faults, more_warnings = _utilisation(record, device, policy, details)
        faults += more_faults
        warnings += more_warnings
        faults += _memory(record)
    elif record.has(REPORTED_TFLOPS):
        warnings.append(_possible_on(float(np.nanmax(record.values(REPORTED_TFLOPS)))))
    status = "invalid" if faults else "warn" if warnings else "pass"
    return GateResult(
        gate="plausibility",
        status=status,
        blocks=True,
        summary="; ".join([*faults, *warnings]) or _summary(details),
        details={**details, "faults": faults, "warnings": warnings},
    )


def _tokens(record: RunRecord) -> list[str]:
    faults = []
    for small, large in (
        ("num_real_tokens", "num_padded_tokens"),
        ("num_supervised_tokens", "num_real_tokens"),
        ("num_vision_tokens", "num_real_tokens"),
    ):
        if record.has(small) and record.has(large):
            faults += _first_wrong(
                record, record.values(small) > record.values(large), f"{small} exceeds {large}"
            )
    for name in ("num_padded_tokens", "num_real_tokens", "num_supervised_tokens"):
        if record.has(name):
            faults += _first_wrong(record, ~(record.values(name) > 0), f"{name} is not positive")
    data = record.recipe.get("data")
    if isinstance(data, dict) and isinstance(data.get("seq_length"), int) and record.has("num_padded_tokens"):
        planned = record.values("global_batch_size") * data["seq_length"]
        found = record.values("num_padded_tokens")
        wrong = (
            found != planned
            if data.get("padding") == "max_length" and not data.get("packing")
            else found > planned
        )
        faults += _first_wrong(record, wrong, "num_padded_tokens is not global_batch_size * seq_length")
    return faults


def _times(record: RunRecord) -> list[str]:
    if not record.has("step_time_ms"):
        return []
    times = record.values("step_time_ms")
    faults = _first_wrong(record, ~(times > 0), "step_time_ms is not positive")
    if all(record.has(name) for name in PARTS):
        parts = np.sum([record.values(name) for name in PARTS], axis=0)
        faults += _first_wrong(
            record, parts > times * PARTS_SLACK + 1.0, "the parts of the step take longer than it"
        )
        # Evaluation and saving may stand in a step beside the three parts, so a few steps may be off.
        short = parts < times * PARTS_SHARE
        if short.mean() > 0.1 and parts.max() > 0:
            faults += _first_wrong(
                record, short, f"the parts of the step make up less than {PARTS_SHARE:.0%} of it"
            )
    return faults


def _wall_clock(record: RunRecord) -> list[str]:
    """All steps together take no longer than the run did. A resumed run has only its last start."""
    info = record.info
    if info is None or not info.ended_at or "--resume" in info.command or not record.has("step_time_ms"):
        return []
    try:
        seconds = (
            datetime.fromisoformat(info.ended_at) - datetime.fromisoformat(info.started_at)
        ).total_seconds()
    except (ValueError, TypeError):
        return [f"start or end of the run is not a time: {info.started_at!r}, {info.ended_at!r}"]
    if seconds < 0:
        return [f"the run ends {-seconds:.0f} s before it starts: the clock was set back"]
    steps = float(np.nansum(record.values("step_time_ms"))) / 1000.0
    if steps > seconds * PARTS_SLACK + CLOCK_SLACK_SECONDS:
        return [f"steps add up to {steps:.0f} s, the run took {seconds:.0f} s by the clock"]
    return []


def _rates(record: RunRecord, policy: Policy, details: dict[str, Any]) -> list[str]:
    """What a log prints must follow from its own step times."""
    if not record.has("step_time_ms"):
        return []
    faults = []
    seconds = record.values("step_time_ms") / 1000.0
    for column, key in (
        (REPORTED_TOKENS, "padded_tokens_per_gpu_per_step"),
        (REPORTED_TFLOPS, "tflop_per_gpu_per_step"),
    ):
        if not record.has(column):
            continue
        printed = record.values(column)
        product = printed * seconds
        product, printed = product[np.isfinite(product)], printed[np.isfinite(product)]
        if not len(product) or not (product > 0).all():
            faults.append(f"{column} is not positive")
            continue
        middle = float(np.median(product))
        # Logs print one decimal: a small number carries a large rounding.
        rounding = policy.plausibility.rounding + 0.1 / float(printed.min())
        spread = float(np.abs(product / middle - 1.0).max())
        details[key] = middle
        if spread > rounding and not _has_varying_batches(record):
            first = int(
                record.series.index[int(np.argmax(np.abs(record.values(column) * seconds / middle - 1.0)))]
            )
            faults.append(f"{column} times step time is not the same at iteration {first} ({spread:.1%} off)")
    if "padded_tokens_per_gpu_per_step" in details and "tflop_per_gpu_per_step" in details:
        details["flops_per_padded_token"] = (
            details["tflop_per_gpu_per_step"] * 1e12 / details["padded_tokens_per_gpu_per_step"]
        )
    return faults


def _has_varying_batches(record: RunRecord) -> bool:
    return record.has("global_batch_size") and len(set(record.values("global_batch_size"))) > 1


def _time_ratio(record: RunRecord, baseline: Baseline, policy: Policy, hardware: str | None) -> list[str]:
    if not record.has("step_time_ms") or not baseline.has("step_time_ms"):
        return []
    ours = float(np.nanmedian(record.values("step_time_ms")))
    theirs = float(np.median([frame["step_time_ms"].median() for frame in baseline.frames()]))
    limits = policy.plausibility
    limit = limits.max_time_ratio_cpu if hardware == "cpu" else limits.max_time_ratio
    if ours > 0 and theirs > 0 and not 1.0 / limit <= ours / theirs <= limit:
        return [
            f"median step {ours:.4g} ms, baseline {theirs:.4g} ms: a factor of {ours / theirs:.3g}; a mistaken unit?"
        ]
    return []


def _utilisation(
    record: RunRecord, device: HardwareClass, policy: Policy, details: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Rates against the dense peak. Without a peak in the table there is no utilisation, and no guess."""
    peak, certain_peak = _peaks(record, device)
    if peak is None or certain_peak is None:
        return [], []
    limits = policy.plausibility
    faults, warnings = [], []
    for name, rate in _tflops(record).items():
        share = rate / peak
        details[f"{name}_share_of_peak"] = share
        text = f"{rate:.1f} TFLOP/s/GPU ({name}) is {share:.0%} of {device.title}'s dense peak of {peak:g}"
        if rate / certain_peak > limits.mfu_invalid:
            faults.append(f"{text}: not possible on this device")
        elif share > limits.mfu_warn:
            warnings.append(f"{text}: hardly possible")
    faults += _reported_mfu(record, peak)
    return faults, warnings


def _peaks(record: RunRecord, device: HardwareClass) -> tuple[float | None, float | None]:
    """Peak of the precision the run used, and the highest it can have used (a log does not tell)."""
    precision = record.recipe.get("precision")
    if isinstance(precision, dict):
        peak = device.fp8_tflops if precision.get("fp8") else device.bf16_tflops
        return peak, peak
    return device.bf16_tflops, device.fp8_tflops or device.bf16_tflops


def _tflops(record: RunRecord) -> dict[str, float]:
    """Highest rate of a step by every definition the record has, medians of steps so that one odd step is no proof."""
    rates: dict[str, float] = {}
    if record.has(REPORTED_TFLOPS):
        rates["reported"] = float(np.nanmedian(record.values(REPORTED_TFLOPS)))
    if not record.world_size or not record.has("step_time_ms"):
        return rates
    data = record.recipe.get("data")
    is_packed = isinstance(data, dict) and bool(data.get("packing"))
    for column in ("megatron_flops", "model_flops"):
        # Packed rows skip attention across samples, which Megatron's formula counts.
        if not record.has(column) or (is_packed and column == "megatron_flops"):
            continue
        per_step = record.values(column) / record.values("step_time_ms")
        median = float(np.nanmedian(per_step))
        rates[column.removesuffix("_flops")] = tflops_per_gpu(
            median, step_time_ms=1.0, world_size=record.world_size
        )
    return {name: rate for name, rate in rates.items() if math.isfinite(rate)}


def _reported_mfu(record: RunRecord, peak: float) -> list[str]:
    """A utilisation that the run itself reports must be model FLOPs over the dense peak."""
    rates = _tflops(record)
    if not record.has("extra.mfu") or "model" not in rates:
        return []
    reported, expected = float(np.nanmedian(record.values("extra.mfu"))), rates["model"] / peak
    if abs(reported / expected - 1.0) > PARTS_SLACK - 1.0:
        return [
            f"reported mfu {reported:.1%} is not model FLOPs over the dense peak, {expected:.1%}: sparse peak?"
        ]
    return []


def _memory(record: RunRecord) -> list[str]:
    hardware = record.info.hardware if record.info else {}
    total = hardware.get("memory_bytes")
    if not record.has("peak_memory_bytes") or not isinstance(total, int) or total <= 0:
        return []
    peak = float(record.values("peak_memory_bytes").max())
    return [f"peak memory {peak:.3g} bytes exceeds the device's {total:.3g}"] if peak > total else []


def _possible_on(tflops: float) -> str:
    able = [row.name for row in HARDWARE.values() if row.bf16_tflops and row.bf16_tflops >= tflops]
    unable = [
        f"{row.name} ({tflops / row.bf16_tflops:.0%} of its peak)"
        for row in HARDWARE.values()
        if row.bf16_tflops and max(row.bf16_tflops, row.fp8_tflops or 0.0) < tflops
    ]
    text = f"hardware not named; {tflops:.1f} TFLOP/s/GPU is possible on {', '.join(able) or 'none of the table'}"
    return text + (f", not on {', '.join(unable)}" if unable else "")


def _summary(details: dict[str, Any]) -> str:
    shares = [f"{key.removesuffix('_share_of_peak')} {value:.1%} of peak" for key, value in details.items()
              if key.endswith("_share_of_peak")]  # fmt: skip
    return "tokens, times and rates are consistent" + (f"; {', '.join(shares)}" if shares else "")


def _first_wrong(record: RunRecord, wrong: np.ndarray, what: str) -> list[str]:
    positions = np.flatnonzero(wrong)
    if not len(positions):
        return []
    return [f"{what} at iteration {int(record.series.index[positions[0]])} ({len(positions)} iterations)"]
