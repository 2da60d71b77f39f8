# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.baselines import Baseline
from harness.gates.convergence import end_window, first_forward, first_steps, held_out, literal
from harness.gates.pairing import Pairing, pair, paired_log_ratios
from harness.policy import Policy
from harness.records import RunRecord
from harness.verdict import GateResult

MakeRecord = Callable[..., RunRecord]
MakeBaseline = Callable[..., Baseline]
PAIRED = Pairing(mode="paired", reason="same samples")
UNPAIRED = Pairing(mode="unpaired", reason="other samples")
REFUSED = Pairing(mode="refused", reason="iterations differ")


def level(baseline: Baseline, column: str = "lm_loss") -> np.ndarray:
    """Geometric mean of the baseline's runs."""
    return np.exp(np.mean([np.log(frame[column].to_numpy()) for frame in baseline.frames()], axis=0))


def at_level(
    make_record: MakeRecord, baseline: Baseline, shift: Any = 0.0, column: str = "lm_loss"
) -> RunRecord:
    """A run whose ln is the baseline's plus a shift."""
    return make_record(columns={column: level(baseline, column) * np.exp(shift)})


@pytest.mark.parametrize(
    ("shift", "same_hardware", "status"),
    [(0.0019, True, "pass"), (-0.0019, True, "pass"), (0.0021, True, "fail"), (-0.0021, True, "fail"),
     (0.0049, False, "pass"), (0.0051, False, "fail")],
)  # fmt: skip
def test_first_forward(
    shift: float,
    same_hardware: bool,
    status: str,
    make_record: MakeRecord,
    baseline: Baseline,
    policy: Policy,
) -> None:
    record = at_level(make_record, baseline, np.r_[shift, np.full(79, 0.1)])
    gate = first_forward(record, baseline, policy, PAIRED, same_hardware=same_hardware)
    margin = 0.002 if same_hardware else 0.005
    assert (gate.gate, gate.status, gate.blocks) == ("C1", status, True)
    assert gate.effect == pytest.approx(math.expm1(shift))
    assert gate.margin == pytest.approx((-margin, margin))
    assert gate.summary == f"first loss {shift:+.3%} from baseline (margin {margin:.1%})"


def test_first_forward_against_transformers(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    first = float(level(baseline)[0])
    for shift, status in ((0.0049, "pass"), (0.0051, "fail")):
        record = at_level(make_record, baseline)
        series = record.series.assign(**{"extra.hf_lm_loss": first / math.exp(shift)})
        record = replace(record, series=series, known=record.known | {"extra.hf_lm_loss"})
        gate = first_forward(record, baseline, policy, PAIRED, same_hardware=True)
        assert gate.status == status
        assert gate.summary.endswith(f", {shift:+.3%} from transformers (margin 0.5%)")
        # The part that is nearest to its margin is the effect.
        assert gate.effect == pytest.approx(math.expm1(shift))
        assert gate.margin == pytest.approx((-0.005, 0.005))
        alone = first_forward(record, baseline, policy, UNPAIRED, same_hardware=True)
        assert (alone.status, "baseline" in alone.summary) == (status, False)


def test_first_forward_needs_the_first_batch(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    gate = first_forward(make_record(), baseline, policy, UNPAIRED, same_hardware=True)
    assert (gate.status, gate.summary, gate.blocks) == (
        "not_run",
        "no common first batch: other samples",
        True,
    )
    late = make_record()
    late = replace(late, series=late.series.iloc[1:])
    assert first_forward(late, baseline, policy, PAIRED, same_hardware=True).status == "not_run"


def shifts(**values: float) -> np.ndarray:
    """Shift by position: shifts(first=0.1, rest=0.0)."""
    return np.r_[np.full(20, values.get("first", 0.0)), np.full(60, values.get("rest", 0.0))]


@pytest.mark.parametrize(
    ("shift", "norm", "status"),
    [
        (shifts(rest=1.0), 0.0, "pass"),
        (shifts(first=0.0029), 0.0, "pass"),
        (shifts(first=0.0031), 0.0, "fail"),
        (shifts(first=-0.0031), 0.0, "fail"),
        (np.tile([0.0049, -0.0049], 40), 0.0, "pass"),
        (np.tile([0.0051, -0.0051], 40), 0.0, "fail"),
        (shifts(), 0.049, "pass"),
        (shifts(), 0.051, "fail"),
        (shifts(), -0.051, "fail"),
    ],
)
def test_first_steps(
    shift: np.ndarray,
    norm: float,
    status: str,
    make_record: MakeRecord,
    make_baseline: MakeBaseline,
    policy: Policy,
) -> None:
    baseline = make_baseline(num_runs=1)
    columns = {
        "lm_loss": level(baseline) * np.exp(shift),
        "grad_norm": level(baseline, "grad_norm") * math.exp(norm),
    }
    gate = first_steps(make_record(columns=columns), baseline, policy, PAIRED)
    assert (gate.gate, gate.status, gate.blocks) == ("C2", status, True)
    assert gate.effect == pytest.approx(float(shift[:20].mean()))
    assert gate.margin == pytest.approx((-0.003, 0.003))
    assert gate.details["checks"] == pytest.approx(
        {
            "mean |d| of lm_loss": float(np.abs(shift[:20]).mean()),
            "|mean d| of lm_loss": abs(float(shift[:20].mean())),
            "mean |d| of grad_norm": abs(norm),
        },
        abs=1e-9,
    )
    assert gate.details["first_beyond"] == (1 if abs(shift[0]) > 0.005 else None)
    assert ("; first beyond at iteration 1" in gate.summary) == (abs(shift[0]) > 0.005)
    assert gate.summary.startswith("first 20 steps: mean |d| of lm_loss ")


def test_first_steps_without_grad_norm_or_pairing(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    gate = first_steps(make_record(columns={"grad_norm": None}), baseline, policy, PAIRED)
    assert (gate.status, "grad_norm" in gate.summary) == ("pass", False)
    gate = first_steps(make_record(), baseline, policy, UNPAIRED)
    assert (gate.status, gate.summary) == ("not_run", "not paired: other samples")


def test_gradient_of_zero_on_one_side_is_no_small_difference(
    make_record: MakeRecord, policy: Policy, make_baseline: MakeBaseline
) -> None:
    baseline = make_baseline(num_runs=1)
    norms = level(baseline, "grad_norm")
    once = norms.copy()
    once[3] = 0.0
    record = at_level(make_record, baseline)
    gate = first_steps(replace(record, series=record.series.assign(grad_norm=once)), baseline, policy, PAIRED)
    assert gate.status == "fail"
    both = make_baseline(make_record(seed=1, columns={"grad_norm": once}))
    gate = first_steps(replace(record, series=record.series.assign(grad_norm=once)), both, policy, PAIRED)
    assert gate.status == "pass"


@pytest.mark.parametrize(
    ("shift", "status"),
    [(0.0, "pass"), (0.045, "pass"), (math.log(1.05), "inconclusive"), (0.055, "fail"), (-0.055, "fail")],
)
def test_end_window_paired(
    shift: float, status: str, make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    wave = 0.002 * np.tile([1.0, -1.0], 40)
    record = at_level(make_record, baseline, np.r_[np.full(30, 9.0), np.full(50, shift)] + wave)
    gate = end_window(record, baseline, policy, PAIRED)
    assert (gate.gate, gate.status, gate.blocks) == ("C3", status, True)
    assert gate.effect == pytest.approx(math.expm1(shift), abs=1e-9)
    assert gate.margin == pytest.approx((1 / 1.05 - 1, 0.05))
    assert gate.interval is not None
    assert gate.minimum_detectable_change is not None
    low, high = gate.interval
    assert low < math.expm1(shift) < high
    assert math.log1p(high) - shift == pytest.approx(shift - math.log1p(low))
    # The spread from run to run is in it: three runs, their mean and one more.
    assert baseline.calibration is not None
    assert baseline.calibration.run_sd is not None
    error = baseline.calibration.run_sd * math.sqrt(1 + 1 / 3)
    assert math.log1p(high) - shift > 1.6 * error
    assert gate.details["window"] == [31, 80]
    assert gate.details["mode"] == "paired"
    assert gate.details["pairing"] == "same samples"
    assert gate.details["df"] == pytest.approx(2.0, rel=0.5)
    assert gate.summary.startswith(f"iterations 31 to 80, paired: {math.expm1(shift):+.2%}, 90% interval [")
    assert gate.summary.endswith(f"margin ±5.0%, detectable {gate.minimum_detectable_change:.2%}")


def test_end_window_of_one_reference_has_no_spread_of_runs(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=1)
    gate = end_window(at_level(make_record, baseline, 0.01), baseline, policy, PAIRED)
    assert gate.interval == pytest.approx((math.expm1(0.01),) * 2)
    assert gate.minimum_detectable_change == pytest.approx(0.0, abs=1e-12)
    assert gate.details["df"] > 10


def test_end_window_margin_is_wider_on_other_hardware(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=1)
    gate = end_window(at_level(make_record, baseline, 0.06), baseline, policy, PAIRED, factor=1.5)
    assert gate.status == "pass"
    assert gate.margin == pytest.approx((1 / 1.075 - 1, 0.075))
    assert "margin ±7.5%" in gate.summary


def test_end_window_that_cannot_be_compared(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=4)
    gate = end_window(make_record(), baseline, policy, REFUSED)
    assert (gate.status, gate.summary) == ("inconclusive", "pairing refused: iterations differ")
    gate = end_window(make_record(), baseline, policy, UNPAIRED)
    text = "other samples; an unpaired comparison takes 5 reference runs, the baseline has 4"
    assert (gate.status, gate.summary) == ("inconclusive", text)
    short = replace(make_record(), series=make_record().series.iloc[:49])
    gate = end_window(short, baseline, policy, PAIRED)
    assert (gate.status, gate.summary) == ("not_run", "49 iterations, the end window takes 50")
    exact = replace(make_record(), series=make_record().series.iloc[:50])
    assert end_window(exact, baseline, policy, UNPAIRED).status == "inconclusive"
    for window, text in (((75, 81), "75:81"), ((-81, -1), "of its last 81 iterations")):
        gate = end_window(make_record(), baseline, policy, PAIRED, window=window)
        assert (gate.status, gate.summary) == (
            "inconclusive",
            f"the run has no window {text} of at least 10 iterations",
        )
    assert end_window(make_record(), baseline, policy, PAIRED, window=(71, 80)).status == "pass"
    assert end_window(make_record(), baseline, policy, PAIRED, window=(72, 80)).status == "inconclusive"


@pytest.mark.parametrize(("shift", "status"), [(0.0, "inconclusive"), (0.2, "fail"), (-0.2, "fail")])
def test_end_window_unpaired(
    shift: float, status: str, make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=5)
    rng = np.random.default_rng(1)
    noise = rng.normal(0.0, 0.01, 80)
    record = at_level(make_record, baseline, shift + noise - noise[30:].mean())
    gate = end_window(record, baseline, policy, UNPAIRED)
    assert gate.status == status
    assert gate.effect == pytest.approx(math.expm1(shift), abs=1e-9)
    assert gate.details["mode"] == "unpaired against 5 runs"
    assert gate.interval is not None
    # Noise of the batches is inside, on both sides: the level itself falls through the window.
    width = math.log1p(gate.interval[1]) - math.log1p(gate.interval[0])
    assert 0.005 < width < 0.3


@pytest.mark.parametrize(
    ("ratio", "status"), [(1.0, "pass"), (1.049, "pass"), (1.051, "fail"), (0.951, "pass"), (0.949, "fail")]
)
def test_literal(
    ratio: float, status: str, make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    reference = float(level(baseline)[-1])
    record = at_level(make_record, baseline, np.r_[np.full(79, 1.0), math.log(ratio)])
    gate = literal(record, baseline, policy, blocks=True)
    assert (gate.gate, gate.status, gate.blocks) == ("literal", status, True)
    assert literal(record, baseline, policy, blocks=False).blocks is False
    assert gate.effect == pytest.approx(ratio - 1)
    assert gate.margin == pytest.approx((-0.05, 0.05))
    assert gate.details["iteration"] == 80
    assert gate.details["reference"] == pytest.approx(reference)
    assert gate.details["value"] == pytest.approx(reference * ratio)
    assert gate.summary.startswith(
        f"lm_loss at iteration 80: {reference * ratio:.6g} against {reference:.6g}, {ratio - 1:+.2%} "
        "(rule: within 5%); "
    )
    assert baseline.calibration is not None
    unpaired = baseline.calibration.literal_unpaired_false_alarm_rate
    assert gate.summary.endswith(
        f"on healthy runs it fails {unpaired:.0%} with another data order, 0% with the same"
    )


def test_literal_says_how_little_it_knows(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    one = literal(make_record(), make_baseline(num_runs=1), policy, blocks=False)
    assert one.summary.endswith("with another data order")
    bare = make_baseline(num_runs=1).model_copy(update={"calibration": None})
    text = "its false-alarm rate cannot be measured on this baseline; 30% to 50% where the data order differs"
    assert literal(make_record(), bare, policy, blocks=False).summary.endswith(text)


def test_literal_needs_the_iteration_on_both_sides(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=1)
    record = make_record()
    short = replace(record, series=record.series.iloc[:79])
    gate = literal(short, baseline, policy, blocks=True)
    assert (gate.status, gate.summary, gate.blocks) == (
        "invalid",
        "the run has no loss at iteration 80",
        True,
    )
    unplanned = literal(replace(short, planned_iterations=None), baseline, policy, blocks=True)
    assert (unplanned.status, unplanned.details["iteration"]) == ("pass", 79)
    longer = literal(replace(record, planned_iterations=81), baseline, policy, blocks=True)
    assert (longer.status, longer.summary) == ("not_run", "the baseline has no loss at iteration 81")


@pytest.mark.parametrize(
    ("shift", "status"),
    [(0.0, "pass"), (0.005, "pass"), (0.03, "fail"), (-0.03, "fail"), (math.log(1.02), "inconclusive")],
)
def test_held_out_loss_of_one_reference(
    shift: float, status: str, make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=1)
    reference = float(baseline.frames()[0]["eval_lm_loss"].iloc[-1])
    losses = np.full(80, math.nan)
    losses[39], losses[79] = 9.0, reference * math.exp(shift)
    gate = held_out(make_record(columns={"eval_lm_loss": losses}), baseline, policy)
    assert (gate.gate, gate.status, gate.blocks) == ("C6", status, True)
    assert gate.effect == pytest.approx(math.expm1(shift))
    # 0.4% from the policy, for both runs; the normal's 95% quantile.
    half = 1.6448536 * 0.004 * math.sqrt(2)
    assert gate.interval == pytest.approx((math.expm1(shift - half), math.expm1(shift + half)), abs=1e-6)
    assert gate.margin == pytest.approx((1 / 1.02 - 1, 0.02))
    assert gate.minimum_detectable_change == pytest.approx(
        (1.6448536 + 1.2815516) * 0.004 * math.sqrt(2), rel=1e-5
    )
    assert gate.summary.startswith(f"held-out loss at iteration 80: {math.expm1(shift):+.2%}, interval [")
    assert gate.summary.endswith("margin ±2%")


def test_held_out_loss_of_several_references(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    finals = np.log([float(frame["eval_lm_loss"].iloc[-1]) for frame in baseline.frames()])
    losses = np.full(80, math.nan)
    losses[79] = math.exp(finals.mean())
    gate = held_out(make_record(columns={"eval_lm_loss": losses}), baseline, policy)
    assert gate.effect == pytest.approx(0.0, abs=1e-12)
    half = 2.9199856 * float(np.std(finals, ddof=1)) * math.sqrt(1 + 1 / 3)  # t, two degrees of freedom
    assert gate.interval == pytest.approx((math.expm1(-half), math.expm1(half)), rel=1e-5)


def test_held_out_loss_that_cannot_be_compared(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    def gate_of(values: np.ndarray | None) -> GateResult:
        return held_out(make_record(columns={"eval_lm_loss": values}), baseline, policy)

    assert (gate_of(None).status, gate_of(None).summary) == ("not_run", "no held-out loss in the run")
    early = np.full(80, math.nan)
    early[78] = 1.6
    assert gate_of(early).status == "inconclusive"
    assert gate_of(early).summary == "held-out loss was measured at another iteration"
    bare = baseline.model_copy(
        update={
            "runs": tuple(
                run.model_copy(update={"columns": {"lm_loss": run.columns["lm_loss"]}})
                for run in baseline.runs
            )
        }
    )
    assert held_out(make_record(), bare, policy).summary == "no held-out loss"


def test_pairing_by_samples(make_record: MakeRecord, baseline: Baseline) -> None:
    assert pair(make_record(), baseline) == Pairing(mode="paired", reason="same samples at every iteration")
    digests = make_record().series["sample_digest"].tolist()
    digests[4] = "other"
    found = pair(make_record(columns={"sample_digest": digests}), baseline)
    assert found == Pairing(
        mode="unpaired", reason="data order differs from iteration 5 on", first_difference=5
    )


def test_pairing_is_refused_for_other_iterations(make_record: MakeRecord, baseline: Baseline) -> None:
    short = replace(make_record(), series=make_record().series.iloc[:70])
    assert pair(short, baseline).reason == "iterations differ: run 70 from 1 to 70, baseline 80 from 1 to 80"
    assert pair(short, baseline).mode == "refused"
    none = replace(make_record(), series=make_record().series.iloc[:0])
    assert pair(none, baseline).reason == "iterations differ: run none, baseline 80 from 1 to 80"
    consumed = make_record().values("consumed_train_samples").copy()
    consumed[9:] += 8
    found = pair(make_record(columns={"consumed_train_samples": consumed}), baseline)
    assert found == Pairing(
        mode="refused", reason="consumed samples differ from iteration 10 on", first_difference=10
    )
    assert pair(make_record(columns={"consumed_train_samples": None}), baseline).mode == "paired"


def test_pairing_by_digest_of_the_whole_run_or_by_evidence(
    make_record: MakeRecord, make_baseline: MakeBaseline, healthy: dict[int, RunRecord]
) -> None:
    plain = make_baseline(make_record(seed=1, columns={"sample_digest": None}))
    record = make_record(columns={"sample_digest": None})
    assert pair(record, plain) == Pairing(mode="paired", reason="same data-order digest")
    other = make_record(columns={"sample_digest": None}, info={"data_order_digest": "x"})
    assert pair(other, plain) == Pairing(mode="unpaired", reason="data-order digests differ")
    silent = make_record(columns={"sample_digest": None}, info={"data_order_digest": None})
    found = pair(silent, plain)
    assert found.mode == "paired"
    assert found.reason.startswith("no data-order digest; step-to-step changes correlate with r = 0.99")
    losses = healthy[1].values("lm_loss") * np.exp(np.random.default_rng(0).normal(0, 0.05, 80))
    unlike = make_record(columns={"sample_digest": None, "lm_loss": losses}, info={"data_order_digest": None})
    assert pair(unlike, plain).mode == "unpaired"
    flat = make_record(
        columns={"sample_digest": None, "lm_loss": [2.0] * 80}, info={"data_order_digest": None}
    )
    assert pair(flat, plain) == Pairing(
        mode="unpaired", reason="data order unknown, and the losses do not tell"
    )


@pytest.mark.parametrize(("count", "mode"), [(20, "paired"), (19, "unpaired")])
def test_pairing_by_evidence_takes_twenty_steps(
    count: int, mode: str, make_record: MakeRecord, make_baseline: MakeBaseline
) -> None:
    def cut(seed: int) -> RunRecord:
        record = make_record(seed=seed, columns={"sample_digest": None}, info={"data_order_digest": None})
        return replace(record, series=record.series.iloc[:count])

    found = pair(cut(4), make_baseline(cut(1)))
    assert found.mode == mode
    assert (found.reason == "data order unknown, and too few steps to tell from the losses") == (
        mode == "unpaired"
    )


def test_paired_ratios_are_against_the_geometric_mean(make_record: MakeRecord, baseline: Baseline) -> None:
    ratios = paired_log_ratios(at_level(make_record, baseline, 0.01), baseline, "lm_loss")
    assert ratios == pytest.approx(np.full(80, 0.01))
