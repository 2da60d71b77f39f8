# SPDX-License-Identifier: Apache-2.0
"""Step time: is it still fast? One measured quantity; rates are derived from it and cannot disagree with it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from harness import statistics
from harness.calibration import steady_rows
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS
from harness.verdict import GateResult, GateStatus
from models.contract.flops import tflops_per_gpu, tokens_per_second_per_gpu

if TYPE_CHECKING:
    import pandas as pd

    from harness.baselines.schema import Baseline
    from harness.policy import Policy, ThroughputLimits
    from harness.records.record import RunRecord

ARITHMETIC_TOLERANCE = 0.1
"""TFLOP/s/GPU; logs print one decimal."""


def throughput(
    record: RunRecord, baseline: Baseline, policy: Policy, *, hardware: str | None, advisory_because: str = ""
) -> GateResult:
    """Median steady step time against the baseline's runs, as a relative change of throughput (+ is faster).

    The interval joins the dependent bootstrap within the run and the spread from run to run. Below `fail` with
    confidence is a regression; above `gain` with confidence asks for a new baseline.

    Args:
        record: The run.
        baseline: A baseline of the same recipe on the same hardware class.
        policy: Limits by hardware class.
        hardware: Class of both.
        advisory_because: Why this result may not block; empty means it does.
    """
    limits = policy.throughput.limits(hardware)
    blocks = not (advisory_because or limits.advisory)
    if not baseline.has("step_time_ms"):
        return _result("not_run", "the baseline has no step times", blocks=blocks)
    steady, num_discarded = steady_rows(record.series, policy)
    if len(steady) < policy.throughput.min_iterations:
        return _result(
            "not_run",
            f"{len(steady)} steady steps, at least {policy.throughput.min_iterations} are needed",
            blocks=False,
        )
    estimate, detectable = _estimate(steady, baseline, policy)
    interval = estimate.interval(policy.alpha)
    status, is_gain = _judge(estimate.mean, interval, limits)
    times = steady["step_time_ms"].to_numpy(dtype=float)
    ours = float(np.median(times))
    note = f"; advisory: {advisory_because}" if advisory_because else "; advisory" if not blocks else ""
    return GateResult(
        gate="throughput",
        status=status,
        blocks=blocks,
        summary=(
            f"median step {ours:.1f} ms over {len(steady)} steps ({num_discarded} discarded): throughput "
            f"{math.expm1(estimate.mean):+.2%}, interval [{math.expm1(interval[0]):+.2%}, "
            f"{math.expm1(interval[1]):+.2%}], fail below {limits.fail:+.0%}, detectable {detectable:.1%}{note}"
        ),
        effect=math.expm1(estimate.mean),
        interval=(math.expm1(interval[0]), math.expm1(interval[1])),
        margin=(limits.fail, limits.gain),
        minimum_detectable_change=detectable,
        details={
            "is_gain": is_gain,
            "num_discarded": num_discarded,
            "first_steady_iteration": int(steady.index[0]),
            "median_step_time_ms": ours,
            "mad_step_time_ms": float(np.median(np.abs(times - ours))),
            "p95_over_p50": float(np.quantile(times, 0.95)) / ours,
        },
    )


def published_throughput(record: RunRecord, baseline: Baseline, policy: Policy) -> GateResult:
    """Padded tokens a second and device beside a published reference. Never blocks: the hardware is not the same."""
    theirs = [value for value in baseline.runs[0].columns.get(REPORTED_TOKENS, ()) if value is not None]
    ours = padded_rate(record, policy)
    if not theirs or ours is None:
        return _result("not_run", "no padded tokens/s to compare", blocks=False)
    reference = float(np.median(theirs))
    return GateResult(
        gate="throughput",
        status="pass",
        blocks=False,
        summary=(
            f"{ours:,.0f} padded tokens/s/GPU, published {reference:,.0f} on unnamed hardware "
            f"({ours / reference - 1.0:+.1%}); advisory"
        ),
        effect=ours / reference - 1.0,
        details={"token_basis": "padded"},
    )


def published_arithmetic(record: RunRecord, baseline: Baseline) -> GateResult:
    """Whether printed rates follow from the printed step times by the published formula. Never blocks."""
    facts = baseline.facts
    names = ("flops_per_padded_token", "global_batch_size", "seq_length", "implied_world_size")
    if not all(name in facts for name in names) or not record.has(REPORTED_TFLOPS):
        return GateResult(
            gate="arithmetic", status="not_run", blocks=False, summary="no printed TFLOP/s to recompute"
        )
    tokens = facts["global_batch_size"] * facts["seq_length"]
    times, world_size = record.values("step_time_ms"), facts["implied_world_size"]
    tflops = np.array(
        [
            tflops_per_gpu(facts["flops_per_padded_token"] * tokens, step_time_ms=ms, world_size=world_size)
            for ms in times
        ]
    )
    largest = float(np.nanmax(np.abs(tflops - record.values(REPORTED_TFLOPS))))
    return GateResult(
        gate="arithmetic",
        status="pass" if largest <= ARITHMETIC_TOLERANCE else "warn",
        blocks=False,
        summary=(
            f"TFLOP/s/GPU recomputed from step times by {facts.get('flops_formula_id')} on {world_size} devices: "
            f"{', '.join(f'{value:.1f}' for value in tflops[:4])}{', …' if len(tflops) > 4 else ''}; "
            f"largest difference from what is printed {largest:.2f}"
        ),
        details={"recomputed_tflops": [float(value) for value in tflops], "unit": "TFLOP/s/GPU"},
    )


def padded_rate(record: RunRecord, policy: Policy) -> float | None:
    """Padded tokens a second and device at the median step; what a log reports, where it reports it."""
    if record.has(REPORTED_TOKENS):
        return float(np.nanmedian(record.values(REPORTED_TOKENS)))
    if not (record.has("num_padded_tokens") and record.world_size):
        return None
    steady, _ = steady_rows(record.series, policy)
    if steady.empty:
        return None
    return tokens_per_second_per_gpu(
        float(np.median(steady["num_padded_tokens"].to_numpy(dtype=float))),
        step_time_ms=float(np.median(steady["step_time_ms"].to_numpy(dtype=float))),
        world_size=record.world_size,
    )


def _estimate(steady: pd.DataFrame, baseline: Baseline, policy: Policy) -> tuple[statistics.Estimate, float]:
    limits = policy.throughput
    within = statistics.series_median(
        np.log(steady["step_time_ms"].to_numpy()),
        num_resamples=policy.bootstrap_resamples,
        seed=policy.bootstrap_seed,
    )
    medians = [
        math.log(float(np.median(steady_rows(frame, policy)[0]["step_time_ms"].to_numpy(dtype=float))))
        for frame in baseline.frames()
    ]
    runs = len(medians)
    # A spread taken from the policy is known, not estimated: no freedom is lost to it.
    sd, freedom = (
        (float(np.std(medians, ddof=1)), runs - 1) if runs > 1 else (limits.default_run_sd, math.inf)
    )
    between = statistics.combine(0.0, [(sd**2 * (1.0 + 1.0 / runs), freedom)])
    estimate = statistics.combine(
        float(np.mean(medians)) - within.mean, [(within.se**2, within.df), (between.se**2, between.df)]
    )
    return estimate, statistics.detectable_change(between, alpha=limits.mde_alpha, power=policy.power)


def _judge(effect: float, interval: tuple[float, float], limits: ThroughputLimits) -> tuple[GateStatus, bool]:
    fail, warn, gain = math.log1p(limits.fail), math.log1p(limits.warn), math.log1p(limits.gain)
    if interval[1] < fail:
        return "fail", False
    if not interval[0] > fail:
        return "inconclusive", False
    return ("warn" if effect < warn else "pass"), interval[0] > gain


def _result(status: GateStatus, summary: str, *, blocks: bool) -> GateResult:
    return GateResult(gate="throughput", status=status, blocks=blocks, summary=summary)
