# SPDX-License-Identifier: Apache-2.0
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.baselines import Baseline
from harness.gates.memory import memory
from harness.gates.pairing import Pairing
from harness.gates.throughput import padded_rate, published_arithmetic, published_throughput, throughput
from harness.gates.trajectory import drift, shape
from harness.policy import Policy
from harness.records import RunRecord
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS

MakeRecord = Callable[..., RunRecord]
MakeBaseline = Callable[..., Baseline]
PAIRED = Pairing(mode="paired", reason="same samples")
UNPAIRED = Pairing(mode="unpaired", reason="other samples")
GIB = 2**30


def shifted(make_record: MakeRecord, baseline: Baseline, shift: Any) -> RunRecord:
    level = np.mean([np.log(frame["lm_loss"].to_numpy()) for frame in baseline.frames()], axis=0)
    return make_record(columns={"lm_loss": np.exp(level + shift)})


def with_policy(policy: Policy, section: str, **values: Any) -> Policy:
    data = policy.model_dump(mode="json")
    data[section] |= values
    return Policy.model_validate_json(json.dumps(data))


@pytest.mark.parametrize(
    ("shift", "status"), [(0.0049, "pass"), (-0.0049, "pass"), (0.0051, "warn"), (-0.0051, "warn")]
)
def test_drift_of_one_reference(
    shift: float, status: str, make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(num_runs=1)
    record = shifted(make_record, baseline, np.r_[np.full(49, 5.0), np.full(31, shift)])
    gate = drift(record, baseline, policy, PAIRED)
    assert (gate.gate, gate.status, gate.blocks) == ("C4", status, False)
    assert gate.effect == pytest.approx(math.expm1(shift))
    assert gate.margin == pytest.approx((-0.005, 0.005))
    assert gate.summary == f"mean from iteration 50 on {math.expm1(shift):+.2%}, margin ±0.50%"
    strict = drift(record, baseline, with_policy(policy, "drift", blocks=True), PAIRED)
    assert (strict.status, strict.blocks) == ("fail" if status == "warn" else "pass", True)


def test_drift_margin_knows_the_noise(make_record: MakeRecord, baseline: Baseline, policy: Policy) -> None:
    assert baseline.calibration is not None
    noisy = baseline.model_copy(
        update={"calibration": baseline.calibration.model_copy(update={"drift_sd": 0.01})}
    )
    gate = drift(shifted(make_record, baseline, 0.029), noisy, policy, PAIRED)
    assert (gate.status, gate.margin) == ("pass", pytest.approx((-0.03, 0.03)))
    bare = baseline.model_copy(update={"calibration": None})
    assert drift(shifted(make_record, baseline, 0.029), bare, policy, PAIRED).margin == pytest.approx(
        (-0.005, 0.005)
    )


def test_drift_needs_pairs_and_length(make_record: MakeRecord, baseline: Baseline, policy: Policy) -> None:
    gate = drift(make_record(), baseline, policy, UNPAIRED)
    assert (gate.gate, gate.status, gate.blocks, gate.summary) == (
        "C4",
        "not_run",
        False,
        "not paired: other samples",
    )
    short = replace(make_record(), series=make_record().series.iloc[:50])
    assert drift(short, baseline, policy, PAIRED).summary == "too few iterations"


def block(position: int, height: float) -> np.ndarray:
    values = np.zeros(80)
    values[25 * position : 25 * position + 25] = height
    return values


@pytest.mark.parametrize(
    ("shift", "status", "first"),
    [
        (block(1, 0.019), "pass", 26),
        (block(1, 0.021), "warn", 26),
        (block(2, -0.021), "warn", 51),
        (block(0, 0.05), "warn", 1),
    ],
)
def test_shape(
    shift: np.ndarray, status: str, first: int, make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    gate = shape(shifted(make_record, baseline, shift), baseline, policy, PAIRED)
    height = float(shift[first - 1])
    assert (gate.gate, gate.status, gate.blocks) == ("C5", status, False)
    assert gate.effect == pytest.approx(math.expm1(height))
    assert gate.margin == pytest.approx((-0.02, 0.02))
    assert gate.details["block_means"] == pytest.approx([shift[0], shift[25], shift[50]])
    assert gate.summary == (
        f"largest 25-iteration mean {math.expm1(height):+.2%} from iteration {first}, 99% band ±2.00%"
    )


def test_shape_band_is_of_healthy_noise(make_record: MakeRecord, baseline: Baseline, policy: Policy) -> None:
    tight = with_policy(policy, "shape", floor=1e-6)
    gate = shape(shifted(make_record, baseline, block(1, 0.01)), baseline, tight, PAIRED)
    assert gate.margin is not None
    # Means of 25 of noise of 0.3% twice over: 0.08%; the largest of three at 99%.
    assert 0.0005 < gate.margin[1] < 0.006
    assert gate.status == "warn"
    unlike = baseline.model_copy(
        update={"runs": (baseline.runs[0], *(run.model_copy(update={"data_order_digest": str(i)})
                                              for i, run in enumerate(baseline.runs[1:])))}
    )  # fmt: skip
    own = shape(shifted(make_record, baseline, block(1, 0.01)), unlike, tight, PAIRED)
    assert own.margin != gate.margin


def test_shape_needs_pairs_and_two_blocks(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    gate = shape(make_record(), baseline, policy, UNPAIRED)
    assert (gate.gate, gate.status, gate.summary) == ("C5", "not_run", "not paired: other samples")
    cut = make_record().series
    assert (
        shape(replace(make_record(), series=cut.iloc[:49]), baseline, policy, PAIRED).summary
        == "too few iterations"
    )


@pytest.mark.parametrize(
    ("peak", "hardware", "status"),
    [(10.4, "h100", "pass"), (10.6, "h100", "fail"), (10.6, "cpu", "warn"), (5.0, "h100", "pass")],
)
def test_memory(
    peak: float,
    hardware: str,
    status: str,
    make_record: MakeRecord,
    make_baseline: MakeBaseline,
    policy: Policy,
) -> None:
    def with_peak(value: float, seed: int = 4) -> RunRecord:
        return make_record(seed=seed, columns={"peak_memory_bytes": [GIB] * 79 + [value * GIB]})

    baseline = make_baseline(with_peak(9.0, 1), with_peak(10.0, 2))
    gate = memory(with_peak(peak), baseline, policy, hardware=hardware)
    assert (gate.gate, gate.status, gate.blocks) == ("memory", status, hardware != "cpu")
    assert gate.effect == pytest.approx(peak / 10 - 1)
    assert gate.margin == pytest.approx((-1.0, 0.05))
    assert gate.summary == f"peak {peak:.2f} GiB, baseline 10.00 GiB ({peak / 10 - 1:+.1%}), limit 10.50 GiB"


def test_memory_slack_is_two_gib_at_most(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(make_record(seed=1, columns={"peak_memory_bytes": [100.0 * GIB] * 80}))
    for peak, status in ((101.9, "pass"), (102.1, "fail")):
        record = make_record(columns={"peak_memory_bytes": [peak * GIB] * 80})
        gate = memory(record, baseline, policy, hardware="h100")
        assert gate.status == status
        assert gate.margin == pytest.approx((-1.0, 0.02))


def test_memory_that_was_not_measured(make_record: MakeRecord, baseline: Baseline, policy: Policy) -> None:
    gate = memory(make_record(columns={"peak_memory_bytes": None}), baseline, policy, hardware="h100")
    assert (gate.status, gate.blocks, gate.summary) == ("not_run", False, "no peak memory to compare")
    gate = memory(make_record(columns={"peak_memory_bytes": [0.0] * 80}), baseline, policy, hardware="h100")
    assert (gate.gate, gate.status, gate.blocks) == ("memory", "not_run", False)
    assert gate.summary == "peak memory was not measured"


def timed(make_record: MakeRecord, milliseconds: float, seed: int = 4) -> RunRecord:
    """Eighty steps: a slow first one, then an alternation around a level."""
    steps = milliseconds * np.where(np.arange(80) % 2, 1.001, 0.999)
    steps[0] = 20 * milliseconds
    return make_record(seed=seed, columns={"step_time_ms": steps})


@pytest.fixture
def timed_baseline(make_record: MakeRecord, make_baseline: MakeBaseline) -> Baseline:
    return make_baseline(
        *(timed(make_record, level, seed) for seed, level in ((1, 99.9), (2, 100.0), (3, 100.1)))
    )


@pytest.mark.parametrize(
    ("milliseconds", "status", "is_gain"),
    [(100.0, "pass", False), (102.0, "pass", False), (103.5, "warn", False), (110.0, "fail", False),
     (90.0, "pass", True),
     (96.0, "pass", False), (105.26, "inconclusive", False)],
)  # fmt: skip
def test_throughput(
    milliseconds: float,
    status: str,
    is_gain: bool,
    make_record: MakeRecord,
    timed_baseline: Baseline,
    policy: Policy,
) -> None:
    gate = throughput(timed(make_record, milliseconds), timed_baseline, policy, hardware="h100")
    assert (gate.gate, gate.status, gate.blocks) == ("throughput", status, True)
    assert gate.effect == pytest.approx(100.0 / milliseconds - 1, abs=2e-3)
    assert gate.margin == (-0.05, 0.05)
    assert gate.interval is not None
    assert gate.interval[0] < (gate.effect or 0.0) < gate.interval[1]
    assert gate.details["is_gain"] is is_gain
    assert gate.details["num_discarded"] == 21  # twenty of warm-up, one that ran an evaluation
    assert gate.details["first_steady_iteration"] == 21
    assert gate.details["median_step_time_ms"] == pytest.approx(milliseconds, rel=2e-3)
    assert gate.details["mad_step_time_ms"] == pytest.approx(0.001 * milliseconds, rel=1.1)
    assert gate.details["p95_over_p50"] == pytest.approx(1.001, abs=1.1e-3)
    assert gate.summary.startswith(
        f"median step {gate.details['median_step_time_ms']:.1f} ms over 59 steps (21 discarded): "
    )
    assert f"fail below -5%, detectable {gate.minimum_detectable_change:.1%}" in gate.summary
    # Runs differ by 0.1%: three and one of them, 1% on one side and 90% power.
    expected = 0.001 * math.sqrt(4 / 3) * (6.9645567 + 1.8856181)
    assert gate.minimum_detectable_change == pytest.approx(expected, rel=0.01)


def test_throughput_that_may_not_block(
    make_record: MakeRecord, timed_baseline: Baseline, policy: Policy
) -> None:
    slow = timed(make_record, 110.0)
    gate = throughput(slow, timed_baseline, policy, hardware="h100", advisory_because="another CPU")
    assert (gate.status, gate.blocks) == ("fail", False)
    assert gate.summary.endswith("; advisory: another CPU")
    gate = throughput(slow, timed_baseline, policy, hardware="cpu")
    assert (gate.status, gate.blocks, gate.margin) == ("pass", False, (-0.5, 1.0))
    assert gate.summary.endswith("; advisory")
    assert not throughput(slow, timed_baseline, policy, hardware="h100").summary.endswith("advisory")


def test_throughput_of_one_reference_takes_its_spread_from_the_policy(
    make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy
) -> None:
    baseline = make_baseline(timed(make_record, 100.0, 1))
    gate = throughput(timed(make_record, 100.0), baseline, policy, hardware="h100")
    assert gate.minimum_detectable_change == pytest.approx(
        0.0065 * math.sqrt(2) * (2.3263479 + 1.2815516), rel=1e-5
    )


def test_throughput_that_cannot_be_compared(
    make_record: MakeRecord, timed_baseline: Baseline, policy: Policy
) -> None:
    short = replace(make_record(), series=make_record().series.iloc[:30])
    gate = throughput(short, timed_baseline, policy, hardware="h100")
    assert (gate.status, gate.blocks) == ("not_run", False)
    assert gate.summary == "15 steady steps, at least 20 are needed"
    bare = timed_baseline.model_copy(
        update={
            "runs": tuple(
                run.model_copy(update={"columns": {"lm_loss": run.columns["lm_loss"]}})
                for run in timed_baseline.runs
            )
        }
    )
    gate = throughput(make_record(), bare, policy, hardware="h100")
    assert (gate.gate, gate.status, gate.blocks) == ("throughput", "not_run", True)
    assert gate.summary == "the baseline has no step times"


def printed(make_record: MakeRecord, tokens: Any, tflops: Any = 400.0) -> RunRecord:
    record = make_record(
        columns={REPORTED_TOKENS: tokens, REPORTED_TFLOPS: tflops, "step_time_ms": [100.0] * 80}
    )
    return replace(record, info=None, framework="megatron_lm")


def test_published_rates(make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy) -> None:
    baseline = make_baseline(printed(make_record, [10000.0] * 40 + [12000.0] * 40))
    gate = published_throughput(printed(make_record, [9900.0] * 80), baseline, policy)
    assert (gate.gate, gate.status, gate.blocks) == ("throughput", "pass", False)
    assert gate.effect == pytest.approx(9900 / 11000 - 1)
    assert gate.details == {"token_basis": "padded"}
    assert (
        gate.summary == "9,900 padded tokens/s/GPU, published 11,000 on unnamed hardware (-10.0%); advisory"
    )
    own = published_throughput(timed(make_record, 100.0), baseline, policy)
    assert own.effect == pytest.approx(7680 / 11000 - 1, rel=2e-2)
    gate = published_throughput(make_record(columns={"num_padded_tokens": None}), baseline, policy)
    assert (gate.status, gate.blocks, gate.summary) == ("not_run", False, "no padded tokens/s to compare")
    assert published_throughput(printed(make_record, [1.0] * 80), make_baseline(), policy).status == "not_run"


def test_padded_rate(make_record: MakeRecord, policy: Policy) -> None:
    record = timed(make_record, 100.0)
    steady = record.values("step_time_ms")[20:79]
    assert padded_rate(record, policy) == pytest.approx(768 / (np.median(steady) / 1000))
    assert padded_rate(printed(make_record, [5.0] * 79 + [math.nan]), policy) == 5.0
    assert padded_rate(replace(record, series=record.series.iloc[:0]), policy) is None
    nobody = replace(record, info=None, declared={})
    assert padded_rate(nobody, policy) is None
    assert record.info is not None
    eight = replace(record, info=record.info.model_copy(update={"world_size": 8}))
    assert padded_rate(eight, policy) == pytest.approx(768 / (np.median(steady) / 1000) / 8)


@pytest.mark.parametrize(("tflops", "status"), [(400.0, "pass"), (400.09, "pass"), (400.2, "warn")])
def test_published_arithmetic(
    tflops: float, status: str, make_record: MakeRecord, make_baseline: MakeBaseline
) -> None:
    facts = {
        "flops_per_padded_token": 400e12 * 0.1 * 8 / (64 * 8192), "global_batch_size": 64, "seq_length": 8192,
        "implied_world_size": 8, "flops_formula_id": "formula",
    }  # fmt: skip
    baseline = make_baseline().model_copy(update={"facts": facts})
    record = printed(make_record, 1.0, [400.0] * 79 + [tflops])
    gate = published_arithmetic(record, baseline)
    assert (gate.gate, gate.status, gate.blocks) == ("arithmetic", status, False)
    assert gate.details["recomputed_tflops"] == pytest.approx([400.0] * 80)
    assert gate.details["unit"] == "TFLOP/s/GPU"
    assert gate.summary == (
        "TFLOP/s/GPU recomputed from step times by formula on 8 devices: 400.0, 400.0, 400.0, 400.0, …; "
        f"largest difference from what is printed {tflops - 400:.2f}"
    )
    silent = published_arithmetic(make_record(), baseline)
    assert (silent.status, silent.blocks, silent.summary) == (
        "not_run",
        False,
        "no printed TFLOP/s to recompute",
    )
    assert published_arithmetic(record, make_baseline()).status == "not_run"
