# SPDX-License-Identifier: Apache-2.0
"""C1 to C6 and the literal rule: is the loss still the loss it was?

    C1  first forward           same checkpoint, same batch: wrong masks, templates and conversions, before any noise
    C2  first steps             paired: optimizer, gradient reduction, loss scaling
    C3  end window              paired equivalence test over the last iterations; the stated 5% target
    C4  drift                   signed mean from iteration 50 on: a one-sided bias hidden inside 5%
    C5  shape                   block means: a spike or a late divergence
    C6  held-out loss           equivalence test at a tenth of the noise
    literal                     "loss at the last iteration within 5%", beside its false-alarm rate

All are two-sided: an unexplained lower loss is how leaked labels and wrong masks look.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from harness import statistics
from harness.gates.pairing import Pairing, paired_log_ratios
from harness.gates.window import MIN_WINDOW, Window, rows_of_window, window_text
from harness.verdict import GateResult, GateStatus

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline
    from harness.policy import Policy
    from harness.records.record import RunRecord

HF_LOSS_COLUMN = "extra.hf_lm_loss"
"""Loss of the first batch by transformers, where the run computed it."""


def first_forward(
    record: RunRecord, baseline: Baseline, policy: Policy, pairing: Pairing, *, same_hardware: bool
) -> GateResult:
    """C1: the loss of the first batch, before any update, against the baseline's and against transformers'."""
    limits = policy.first_forward
    margin = limits.margin_same_hardware if same_hardware else limits.margin_other_hardware
    parts: list[tuple[str, float, float]] = []
    if pairing.mode == "paired" and int(record.series.index[0]) == 1:
        parts.append(("baseline", float(paired_log_ratios(record, baseline, "lm_loss")[0]), margin))
    if record.has(HF_LOSS_COLUMN):
        reference = float(record.values(HF_LOSS_COLUMN)[0])
        if not (math.isfinite(reference) and reference > 0):
            return _result("C1", "invalid", f"loss of the first batch by transformers is {reference}")
        parts.append(
            (
                "transformers",
                math.log(float(record.values("lm_loss")[0]) / reference),
                limits.margin_reference,
            )
        )
    if not parts:
        return _not_run("C1", f"no common first batch: {pairing.reason}")
    worst = max(parts, key=lambda part: abs(part[1]) / part[2])
    is_fine = all(abs(effect) <= limit for _, effect, limit in parts)
    text = ", ".join(f"{effect:+.3%} from {name} (margin {limit:.1%})" for name, effect, limit in parts)
    return GateResult(
        gate="C1",
        status="pass" if is_fine else "fail",
        blocks=True,
        summary=f"first loss {text}",
        effect=math.expm1(worst[1]),
        margin=(-worst[2], worst[2]),
    )


def first_steps(record: RunRecord, baseline: Baseline, policy: Policy, pairing: Pairing) -> GateResult:
    """C2: mean |d|, |mean d| of the loss and mean |d| of the gradient norm over the first steps, paired."""
    limits = policy.first_steps
    if pairing.mode != "paired":
        return _not_run("C2", f"not paired: {pairing.reason}")
    losses = paired_log_ratios(record, baseline, "lm_loss")[: limits.num_iterations]
    mean_abs, mean = float(np.abs(losses).mean()), float(losses.mean())
    checks = [
        ("mean |d| of lm_loss", mean_abs, limits.mean_abs_margin),
        ("|mean d| of lm_loss", abs(mean), limits.mean_margin),
    ]
    if record.has("grad_norm") and baseline.has("grad_norm"):
        norms = _grad_norm_differences(record, baseline)[: limits.num_iterations]
        checks.append(("mean |d| of grad_norm", float(np.abs(norms).mean()), limits.grad_norm_margin))
    failed = [check for check in checks if not check[1] <= check[2]]
    over = np.flatnonzero(np.abs(losses) > limits.mean_abs_margin)
    first = int(record.series.index[over[0]]) if len(over) else None
    text = ", ".join(f"{name} {value:.3%} (margin {margin:.1%})" for name, value, margin in checks)
    return GateResult(
        gate="C2",
        status="fail" if failed else "pass",
        blocks=True,
        summary=f"first {len(losses)} steps: {text}"
        + (f"; first beyond at iteration {first}" if first else ""),
        effect=mean,
        margin=(-limits.mean_margin, limits.mean_margin),
        details={"checks": {name: value for name, value, _ in checks}, "first_beyond": first},
    )


def end_window(
    record: RunRecord,
    baseline: Baseline,
    policy: Policy,
    pairing: Pairing,
    *,
    factor: float = 1.0,
    window: Window | None = None,
) -> GateResult:
    """C3: equivalence of the end window's mean log loss, paired where the data order allows it.

    Args:
        record: The run.
        baseline: What it is compared with.
        policy: Margin, confidence, and the window where none is given.
        pairing: How the two can be compared.
        factor: Widens the margin, for another hardware class.
        window: Iterations to compare over; None takes the policy's last ones.
    """
    limits = policy.end_window
    bound = math.log1p(limits.margin * factor)
    if pairing.mode == "refused":
        return _result("C3", "inconclusive", f"pairing refused: {pairing.reason}")
    if window is None and len(record.series) < limits.num_iterations:
        return _not_run(
            "C3", f"{len(record.series)} iterations, the end window takes {limits.num_iterations}"
        )
    part = rows_of_window(record.series.index, window or (-limits.num_iterations, -1))
    if part is None or part.stop - part.start < MIN_WINDOW:
        return _result(
            "C3",
            "inconclusive",
            f"the run has no window {window_text(window)} of at least {MIN_WINDOW} iterations",
        )
    if pairing.mode == "paired":
        estimate, how = _paired_estimate(record, baseline, policy, part), "paired"
    elif len(baseline.runs) >= limits.min_references_unpaired:
        estimate, how = (
            _unpaired_estimate(record, baseline, policy, part),
            f"unpaired against {len(baseline.runs)} runs",
        )
    else:
        return _result(
            "C3",
            "inconclusive",
            f"{pairing.reason}; an unpaired comparison takes {limits.min_references_unpaired} reference runs, "
            f"the baseline has {len(baseline.runs)}",
        )
    interval, margin = estimate.interval(policy.alpha), (-bound, bound)
    status = _three_way(interval, margin)
    detectable = statistics.detectable_change(estimate, alpha=policy.alpha, power=policy.power)
    first, last = int(record.series.index[part][0]), int(record.series.index[part][-1])
    text = (
        f"iterations {first} to {last}, {how}: {math.expm1(estimate.mean):+.2%}, "
        f"{1 - 2 * policy.alpha:.0%} interval [{math.expm1(interval[0]):+.2%}, {math.expm1(interval[1]):+.2%}], "
        f"margin ±{limits.margin * factor:.1%}, detectable {detectable:.2%}"
    )
    return GateResult(
        gate="C3",
        status=status,
        blocks=True,
        summary=text,
        effect=math.expm1(estimate.mean),
        interval=(math.expm1(interval[0]), math.expm1(interval[1])),
        margin=(math.expm1(-bound), math.expm1(bound)),
        minimum_detectable_change=detectable,
        details={
            "mode": how,
            "pairing": pairing.reason,
            "window": [first, last],
            "df": min(estimate.df, 1e9),
        },
    )


def literal(record: RunRecord, baseline: Baseline, policy: Policy, *, blocks: bool) -> GateResult:
    """The single-point rule: |loss / baseline's loss - 1| at the last planned iteration, within 5%."""
    margin = policy.literal.margin
    iteration = record.planned_iterations or int(record.series.index[-1])
    references = [
        float(frame["lm_loss"].loc[iteration])
        for frame in baseline.frames()
        if "lm_loss" in frame and iteration in frame.index and math.isfinite(frame["lm_loss"].loc[iteration])
    ]
    if not references:
        return _result(
            "literal", "not_run", f"the baseline has no loss at iteration {iteration}", blocks=blocks
        )
    if iteration not in record.series.index:
        return _result("literal", "invalid", f"the run has no loss at iteration {iteration}", blocks=blocks)
    reference = math.exp(float(np.mean(np.log(references))))
    value = float(record.series["lm_loss"].loc[iteration])
    effect = value / reference - 1.0
    is_within = abs(effect) <= margin
    return GateResult(
        gate="literal",
        status="pass" if is_within else "fail",
        blocks=blocks,
        summary=(
            f"lm_loss at iteration {iteration}: {value:.6g} against {reference:.6g}, {effect:+.2%} "
            f"(rule: within {margin:.0%}); {_false_alarm_text(baseline)}"
        ),
        effect=effect,
        margin=(-margin, margin),
        details={"iteration": iteration, "value": value, "reference": reference},
    )


def held_out(record: RunRecord, baseline: Baseline, policy: Policy) -> GateResult:
    """C6: equivalence of the last held-out loss."""
    limits = policy.held_out
    if not baseline.has("eval_lm_loss") or not record.has("eval_lm_loss"):
        return _not_run("C6", "no held-out loss" + ("" if record.has("eval_lm_loss") else " in the run"))
    ours = record.series["eval_lm_loss"].dropna()
    finals = [frame["eval_lm_loss"].dropna() for frame in baseline.frames()]
    if any(int(values.index[-1]) != int(ours.index[-1]) for values in finals):
        return _result("C6", "inconclusive", "held-out loss was measured at another iteration")
    references = np.log([float(values.iloc[-1]) for values in finals])
    runs = len(references)
    # A spread taken from the policy is known, not estimated: no freedom is lost to it.
    sd, freedom = (
        (float(np.std(references, ddof=1)), runs - 1) if runs > 1 else (limits.default_run_sd, math.inf)
    )
    estimate = statistics.combine(
        math.log(float(ours.iloc[-1])) - float(references.mean()), [(sd**2 * (1.0 + 1.0 / runs), freedom)]
    )
    interval, bound = estimate.interval(policy.alpha), math.log1p(limits.margin)
    return GateResult(
        gate="C6",
        status=_three_way(interval, (-bound, bound)),
        blocks=True,
        summary=(
            f"held-out loss at iteration {int(ours.index[-1])}: {math.expm1(estimate.mean):+.2%}, "
            f"interval [{math.expm1(interval[0]):+.2%}, {math.expm1(interval[1]):+.2%}], margin ±{limits.margin:.0%}"
        ),
        effect=math.expm1(estimate.mean),
        interval=(math.expm1(interval[0]), math.expm1(interval[1])),
        margin=(math.expm1(-bound), math.expm1(bound)),
        minimum_detectable_change=statistics.detectable_change(
            estimate, alpha=policy.alpha, power=policy.power
        ),
    )


def _paired_estimate(
    record: RunRecord, baseline: Baseline, policy: Policy, part: slice
) -> statistics.Estimate:
    """Mean of d over the window; error from the dependent bootstrap within it and from run to run."""
    runs = len(baseline.runs)
    within = _window_mean(paired_log_ratios(record, baseline, "lm_loss")[part], policy)
    parts = [(within.se**2, within.df)]
    between = baseline.calibration.run_sd if baseline.calibration else None
    if between is not None:
        parts.append((between**2 * (1.0 + 1.0 / runs), runs - 1))
    return statistics.combine(within.mean, parts)


def _unpaired_estimate(
    record: RunRecord, baseline: Baseline, policy: Policy, part: slice
) -> statistics.Estimate:
    """Difference of window means; error from noise inside each window and from what runs differ beyond it."""
    runs = len(baseline.runs)
    ours = _window_mean(np.log(record.values("lm_loss"))[part], policy)
    windows = [
        np.log(frame["lm_loss"].loc[record.series.index[part]].to_numpy()) for frame in baseline.frames()
    ]
    theirs = [_window_mean(window, policy) for window in windows]
    means = np.array([item.mean for item in theirs])
    within = float(np.mean([item.se**2 for item in theirs]))
    freedom = float(sum(item.df for item in theirs))
    between = statistics.run_sd(means, within)
    return statistics.combine(
        ours.mean - float(means.mean()),
        [(ours.se**2, ours.df), (within / runs, freedom), (between**2 * (1.0 + 1.0 / runs), runs - 1)],
    )


def _window_mean(values: np.ndarray, policy: Policy) -> statistics.Estimate:
    return statistics.series_mean(
        values, num_resamples=policy.bootstrap_resamples, seed=policy.bootstrap_seed
    )


def _grad_norm_differences(record: RunRecord, baseline: Baseline) -> np.ndarray:
    """Ln of the ratio, where a norm of 0 on both sides is no difference and on one side an infinite one."""
    ours = record.values("grad_norm")
    theirs = np.mean([frame["grad_norm"].to_numpy() for frame in baseline.frames()], axis=0)
    differences = np.full(len(ours), math.inf)
    differences[(ours == 0) & (theirs == 0)] = 0.0
    both = (ours > 0) & (theirs > 0)
    differences[both] = np.log(ours[both] / theirs[both])
    return differences


def _three_way(interval: tuple[float, float], margin: tuple[float, float]) -> GateStatus:
    if statistics.is_equivalent(interval, margin):
        return "pass"
    return "fail" if statistics.is_different(interval, margin) else "inconclusive"


def _false_alarm_text(baseline: Baseline) -> str:
    calibration = baseline.calibration
    if calibration is None:
        return "its false-alarm rate cannot be measured on this baseline; 30% to 50% where the data order differs"
    paired = calibration.literal_paired_false_alarm_rate
    text = f"on healthy runs it fails {calibration.literal_unpaired_false_alarm_rate:.0%} with another data order"
    return text if paired is None else f"{text}, {paired:.0%} with the same"


def _not_run(gate: str, why: str) -> GateResult:
    return _result(gate, "not_run", why)


def _result(gate: str, status: GateStatus, summary: str, *, blocks: bool = True) -> GateResult:
    return GateResult(gate=gate, status=status, blocks=blocks, summary=summary)
