# SPDX-License-Identifier: Apache-2.0
"""What the runs of a baseline say about noise: A/A pairs, run-to-run spread, minimum detectable change."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from harness import statistics

if TYPE_CHECKING:
    import pandas as pd

    from harness.policy import Policy


BLOCK = 10
"""Steps a block when warm-up is looked for."""
WARM_RATIO = 1.1
"""A leading block this much slower than the rest is still warming up."""


class Calibration(BaseModel):
    """Noise, as relative changes (0.01 is 1%); None where the runs cannot tell."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    num_runs: int
    num_pairs: int
    """A/A pairs: same recipe, same data order."""
    window_sd: float
    """Step-to-step sd of ln(lm_loss) in the end window, trend removed."""
    paired_sd: float | None = None
    """sd of d = ln(a/b) in the end window, over A/A pairs."""
    run_sd: float | None = None
    """Run-to-run sd of the end window's mean of ln(lm_loss)."""
    drift_sd: float | None = None
    """sd of the mean of d from the drift gate's first iteration on, over A/A pairs."""
    block_length: float = 1.0
    half_width: float | None = None
    """Half width of the interval that the end-window test will have for a like run."""
    loss_minimum_detectable_change: float | None = None
    step_time_run_sd: float | None = None
    step_time_minimum_detectable_change: float | None = None
    eval_run_sd: float | None = None
    literal_unpaired_false_alarm_rate: float
    literal_paired_false_alarm_rate: float | None = None


def calibrate(frames: list[pd.DataFrame], digests: list[str], policy: Policy) -> Calibration | None:
    """Measure the noise of a baseline's runs.

    Args:
        frames: One series a run.
        digests: Their data-order digests; empty ones pair with nothing.
        policy: Windows, alpha and power.

    Returns: None when the runs are too short for an end window.
    """
    size = policy.end_window.num_iterations
    if any("lm_loss" not in frame or len(frame) < min(size, 10) for frame in frames):
        return None
    logs = [np.log(frame["lm_loss"].to_numpy()) for frame in frames]
    if not all(np.isfinite(values).all() for values in logs):
        return None
    windows = [values[-size:] for values in logs]
    noise = [statistics.detrend(window) for window in windows]
    pairs = [
        (a, b)
        for a, b in combinations(range(len(frames)), 2)
        if digests[a] and digests[a] == digests[b] and len(logs[a]) == len(logs[b])
    ]
    means = np.array([window.mean() for window in windows])
    run_sd = float(np.std(means, ddof=1)) if len(frames) > 1 else None
    gaps = [windows[a] - windows[b] for a, b in pairs]
    start = policy.drift.first_iteration - 1
    drifts = [float((logs[a] - logs[b])[start:].mean()) for a, b in pairs if len(logs[a]) > start]
    estimate = _estimate_of_like_run(gaps, run_sd, len(frames), policy)
    margin = policy.literal.margin
    return Calibration(
        num_runs=len(frames),
        num_pairs=len(pairs),
        window_sd=float(np.sqrt(np.mean([values.var() for values in noise]))),
        paired_sd=_root_mean_square([gap.std() for gap in gaps]),
        run_sd=run_sd,
        drift_sd=_root_mean_square(drifts),
        block_length=float(np.mean([statistics.optimal_block_length(gap) for gap in gaps])) if gaps else 1.0,
        half_width=None if estimate is None else estimate.interval(policy.alpha)[1] - estimate.mean,
        loss_minimum_detectable_change=None
        if estimate is None
        else statistics.detectable_change(estimate, alpha=policy.alpha, power=policy.power),
        **_step_time_noise(frames, policy),
        eval_run_sd=_eval_run_sd(frames),
        literal_unpaired_false_alarm_rate=float(
            np.mean([statistics.literal_false_alarm_rate(window, margin) for window in windows])
        ),
        literal_paired_false_alarm_rate=float(
            np.mean([np.abs(np.expm1(statistics.detrend(gap))) > margin for gap in gaps])
        )
        if gaps
        else None,
    )


def steady_rows(frame: pd.DataFrame, policy: Policy) -> tuple[pd.DataFrame, int]:
    """Rows that count for step time, and how many were discarded.

    The first ``max(discard_iterations, discard_fraction)`` rows go, then whole blocks of ten while they are slower
    than what follows (warm-up that lasts), and steps that ran an evaluation. A run too short for that keeps its
    second half.
    """
    limits = policy.throughput
    discard = max(limits.discard_iterations, math.ceil(limits.discard_fraction * len(frame)))
    if len(frame) - discard < limits.min_iterations:
        discard = min(discard, len(frame) // 2)
    while len(frame) - discard >= max(limits.min_iterations, len(frame) // 2) + BLOCK and _is_warming(
        frame, discard
    ):
        discard += BLOCK
    steady = frame.iloc[discard:]
    if "eval_lm_loss" in steady:
        steady = steady[steady["eval_lm_loss"].isna()]
    return steady, len(frame) - len(steady)


def _is_warming(frame: pd.DataFrame, start: int) -> bool:
    if "step_time_ms" not in frame:
        return False
    times = frame["step_time_ms"]
    block, rest = times.iloc[start : start + BLOCK], times.iloc[start + BLOCK :]
    return bool(block.median() > WARM_RATIO * rest.median())


def _estimate_of_like_run(
    gaps: list[np.ndarray], run_sd: float | None, num_runs: int, policy: Policy
) -> statistics.Estimate | None:
    if run_sd is None or not gaps:
        return None
    within = [
        statistics.series_mean(gap, num_resamples=policy.bootstrap_resamples, seed=policy.bootstrap_seed)
        for gap in gaps
    ]
    # A gap is between two single runs; a candidate is compared with the mean of all runs.
    share = (1.0 + 1.0 / num_runs) / 2.0
    variance = float(np.mean([item.se**2 for item in within])) * share
    freedom = float(np.mean([item.df for item in within]))
    between = run_sd**2 * (1.0 + 1.0 / num_runs)
    return statistics.combine(0.0, [(variance, freedom), (between, num_runs - 1)])


def _step_time_noise(frames: list[pd.DataFrame], policy: Policy) -> dict[str, float | None]:
    medians = []
    for frame in frames:
        if "step_time_ms" not in frame:
            return {}
        times = steady_rows(frame, policy)[0]["step_time_ms"].to_numpy(dtype=float)
        if not len(times) or not (times > 0).all():
            return {}
        medians.append(math.log(float(np.median(times))))
    if len(medians) < 2:
        return {}
    sd = float(np.std(medians, ddof=1))
    change = statistics.minimum_detectable_change(
        sd, num_reference=len(medians), alpha=policy.throughput.mde_alpha, power=policy.power
    )
    return {"step_time_run_sd": sd, "step_time_minimum_detectable_change": change}


def _eval_run_sd(frames: list[pd.DataFrame]) -> float | None:
    if len(frames) < 2 or any("eval_lm_loss" not in frame for frame in frames):
        return None
    finals = [frame["eval_lm_loss"].dropna() for frame in frames]
    if any(values.empty or values.iloc[-1] <= 0 for values in finals):
        return None
    return float(np.std([math.log(values.iloc[-1]) for values in finals], ddof=1))


def _root_mean_square(values: list[float]) -> float | None:
    return float(np.sqrt(np.mean(np.square(values)))) if values else None
