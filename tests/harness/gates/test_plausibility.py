# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.baselines import Baseline
from harness.gates.plausibility import plausibility
from harness.policy import Policy
from harness.records import RunRecord
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS

MakeRecord = Callable[..., RunRecord]


def changed(record: RunRecord, column: str, value: float, iteration: int = 7) -> list[float]:
    cells = record.values(column).tolist()
    cells[iteration - 1] = value
    return cells


def found(
    record: RunRecord, policy: Policy, hardware: str | None = "cpu", baseline: Baseline | None = None
) -> tuple[list[str], list[str]]:
    gate = plausibility(record, policy, hardware=hardware, baseline=baseline)
    assert (gate.gate, gate.blocks) == ("plausibility", True)
    faults, warnings = gate.details["faults"], gate.details["warnings"]
    assert gate.status == ("invalid" if faults else "warn" if warnings else "pass")
    assert gate.summary == "; ".join([*faults, *warnings]) or not faults + warnings
    return faults, warnings


def test_healthy_run_is_plausible(make_record: MakeRecord, policy: Policy) -> None:
    gate = plausibility(make_record(), policy, hardware="cpu")
    assert (gate.status, gate.summary) == ("pass", "tokens, times and rates are consistent")


@pytest.mark.parametrize(
    ("name", "value", "texts"),
    [
        ("num_real_tokens", 769.0, ["num_real_tokens exceeds num_padded_tokens at iteration 7 (1 iterations)"]),
        ("num_real_tokens", 768.0, []),
        ("num_supervised_tokens", 700.0, [
            "num_supervised_tokens exceeds num_real_tokens at iteration 7 (1 iterations)"
        ]),
        ("num_vision_tokens", 700.0, ["num_vision_tokens exceeds num_real_tokens at iteration 7 (1 iterations)"]),
        ("num_vision_tokens", 0.0, []),
        ("num_supervised_tokens", 0.0, ["num_supervised_tokens is not positive at iteration 7 (1 iterations)"]),
        ("num_padded_tokens", 769.0, [
            "num_padded_tokens is not global_batch_size * seq_length at iteration 7 (1 iterations)"
        ]),
        ("step_time_ms", 0.0, [
            "step_time_ms is not positive at iteration 7 (1 iterations)",
            "the parts of the step take longer than it at iteration 7 (1 iterations)",
        ]),
        ("step_time_ms", math.nan, ["step_time_ms is not positive at iteration 7 (1 iterations)"]),
        ("data_time_ms", 30.0, ["the parts of the step take longer than it at iteration 7 (1 iterations)"]),
        ("data_time_ms", 12.0, []),
    ],
)  # fmt: skip
def test_impossible_value_is_named(
    name: str, value: float, texts: list[str], make_record: MakeRecord, policy: Policy
) -> None:
    record = make_record(columns={name: changed(make_record(), name, value)})
    assert found(record, policy)[0] == texts


def with_data(record: RunRecord, **data: Any) -> RunRecord:
    assert record.info is not None
    recipe = {**record.info.recipe, "data": {**record.info.recipe["data"], **data}}
    return replace(record, info=record.info.model_copy(update={"recipe": recipe}))


def test_padding_to_the_longest_may_be_shorter_than_the_limit(
    make_record: MakeRecord, policy: Policy
) -> None:
    shorter = make_record(columns={"num_padded_tokens": changed(make_record(), "num_padded_tokens", 700.0)})
    text = "num_padded_tokens is not global_batch_size * seq_length at iteration 7 (1 iterations)"
    assert found(with_data(shorter, padding="longest"), policy)[0] == []
    assert found(with_data(shorter, padding="max_length"), policy)[0] == [text]
    assert found(with_data(shorter, padding="max_length", packing=True), policy)[0] == []


def test_parts_must_make_up_the_step_nearly_always(make_record: MakeRecord, policy: Policy) -> None:
    record = make_record()
    for count, is_fault in ((8, False), (9, True)):
        parts = record.values("forward_backward_time_ms").copy()
        parts[10 : 10 + count] *= 0.5
        texts = found(make_record(columns={"forward_backward_time_ms": parts}), policy)[0]
        expected = [f"the parts of the step make up less than 95% of it at iteration 11 ({count} iterations)"]
        # Of the first step, in which a compiler runs, the parts are whole as well.
        assert texts == (expected if is_fault else [])
    nothing = dict.fromkeys(("data_time_ms", "forward_backward_time_ms", "optimizer_time_ms"), [0.0] * 80)
    assert found(make_record(columns=nothing), policy)[0] == []


@pytest.mark.parametrize(
    ("info", "texts"),
    [
        ({"ended_at": None}, []),
        ({"ended_at": "2026-01-05T08:00:11+00:00"}, []),
        ({"ended_at": "2026-01-05T08:00:06+00:00"}, ["steps add up to 11 s, the run took 6 s by the clock"]),
        (
            {"ended_at": "2026-01-05T07:59:00+00:00"},
            ["the run ends 60 s before it starts: the clock was set back"],
        ),
        ({"ended_at": "x"}, ["start or end of the run is not a time: '2026-01-05T08:00:00+00:00', 'x'"]),
        ({"ended_at": "2026-01-05T08:00:06+00:00", "command": ["train", "--resume"]}, []),
    ],
)
def test_clock(info: dict[str, Any], texts: list[str], make_record: MakeRecord, policy: Policy) -> None:
    assert found(make_record(info=info), policy)[0] == texts


def printing(make_record: MakeRecord, rate: float = 400.0, tokens: float = 768.0) -> RunRecord:
    """A log that prints rates beside its step times."""
    seconds = make_record().values("step_time_ms") / 1000.0
    columns = {
        REPORTED_TFLOPS: np.round(rate * 0.12 / seconds, 1),
        REPORTED_TOKENS: np.round(tokens / seconds, 1),
    }
    return replace(make_record(columns=columns), info=None, framework="megatron_lm")


def test_printed_rates_follow_from_step_times(make_record: MakeRecord, policy: Policy) -> None:
    record = printing(make_record)
    gate = plausibility(record, policy, hardware="h100")
    assert gate.details["faults"] == []
    assert gate.details["padded_tokens_per_gpu_per_step"] == pytest.approx(768.0, rel=1e-4)
    assert gate.details["tflop_per_gpu_per_step"] == pytest.approx(48.0, rel=1e-3)
    assert gate.details["flops_per_padded_token"] == pytest.approx(48e12 / 768, rel=1e-3)
    off = replace(
        record, series=record.series.assign(**{REPORTED_TFLOPS: changed(record, REPORTED_TFLOPS, 440.0, 20)})
    )
    (text,) = found(off, policy, "h100")[0]
    assert text.startswith(f"{REPORTED_TFLOPS} times step time is not the same at iteration 20 (")
    none = replace(record, series=record.series.assign(**{REPORTED_TOKENS: [0.0] * 80}))
    assert found(none, policy, "h100")[0] == [f"{REPORTED_TOKENS} is not positive"]
    varying = replace(off, series=off.series.assign(global_batch_size=[8.0] * 40 + [16.0] * 40))
    assert found(varying, policy, "h100")[0] == []


def test_rate_beyond_the_peak(make_record: MakeRecord, policy: Policy) -> None:
    record = printing(make_record, rate=560.0)
    assert found(record, policy, "h100") == ([], [])
    # A log does not tell its precision: what fp8 could do is hardly possible, not impossible.
    faults, warnings = found(record, policy, "h20")
    assert len(faults) == 1
    assert faults[0].endswith("of NVIDIA H20's dense peak of 148: not possible on this device")
    faults, warnings = found(printing(make_record, rate=200.0), policy, "h20")
    assert (faults, len(warnings)) == ([], 1)
    assert warnings[0].endswith("of NVIDIA H20's dense peak of 148: hardly possible")
    # Nobody says what it ran on: the table tells where it could have.
    (text,) = found(record, policy, None)[1]
    assert text.startswith("hardware not named; ")
    assert "is possible on" in text
    assert "h100" in text.split("not on")[0]
    assert "h20 (" in text.split("not on")[1]
    # A class without a peak has no utilisation, and no guess.
    assert found(record, policy, "npu_a2") == ([], [])


def test_own_flops_against_the_peak(make_record: MakeRecord, policy: Policy) -> None:
    per_step = make_record().values("step_time_ms") * 1e9  # one TFLOP/s
    h20 = {"hardware": {"kind": "cuda", "device_name": "NVIDIA H20"}}
    for rate, status in ((100.0, "pass"), (120.0, "warn"), (150.0, "invalid")):
        record = make_record(
            columns={"megatron_flops": per_step * rate, "model_flops": per_step * rate * 0.9}, info=h20
        )
        gate = plausibility(record, policy, hardware="h20")
        assert gate.status == status
        assert gate.details["megatron_share_of_peak"] == pytest.approx(rate / 148)
        assert gate.details["model_share_of_peak"] == pytest.approx(0.9 * rate / 148)
    fine = make_record(columns={"megatron_flops": per_step * 100, "model_flops": per_step * 90}, info=h20)
    text = plausibility(fine, policy, hardware="h20").summary
    assert text == "tokens, times and rates are consistent; megatron 67.6% of peak, model 60.8% of peak"
    # Megatron's formula counts attention across the samples of a packed row; it may exceed the peak.
    packed = with_data(make_record(columns={"megatron_flops": per_step * 150}, info=h20), packing=True)
    assert "megatron_share_of_peak" not in plausibility(packed, policy, hardware="h20").details
    assert plausibility(packed, policy, hardware="h20").status == "pass"


@pytest.mark.parametrize(("peak", "is_fault"), [(148.0, False), (296.0, True), (149.0, False), (155.0, True)])
def test_reported_utilisation_is_of_the_dense_peak(
    peak: float, is_fault: bool, make_record: MakeRecord, policy: Policy
) -> None:
    per_step = make_record().values("step_time_ms") * 1e9
    columns = {"model_flops": per_step * 74, "megatron_flops": per_step * 74, "extra.mfu": [74 / peak] * 80}
    faults = found(make_record(columns=columns), policy, "h20")[0]
    text = f"reported mfu {74 / peak:.1%} is not model FLOPs over the dense peak, 50.0%: sparse peak?"
    assert faults == ([text] if is_fault else [])


def test_more_memory_than_there_is(make_record: MakeRecord, policy: Policy) -> None:
    hardware = {"kind": "cuda", "device_name": "NVIDIA H20", "memory_bytes": 96 * 10**9}
    for peak, texts in ((96e9, []), (97e9, ["peak memory 9.7e+10 bytes exceeds the device's 9.6e+10"])):
        record = make_record(columns={"peak_memory_bytes": [8e8] * 79 + [peak]}, info={"hardware": hardware})
        assert found(record, policy, "h20")[0] == texts
    for total in (0, "much", None):
        record = make_record(
            columns={"peak_memory_bytes": [1e12] * 80}, info={"hardware": {**hardware, "memory_bytes": total}}
        )
        assert found(record, policy, "h20")[0] == []


@pytest.mark.parametrize(
    ("factor", "hardware", "is_fault"),
    [(9.5, "h100", False), (10.5, "h100", True), (1 / 9.5, "h100", False), (1 / 10.5, "h100", True),
     (95.0, "cpu", False), (105.0, "cpu", True), (1 / 105, "cpu", True)],
)  # fmt: skip
def test_time_that_is_off_by_a_unit(
    factor: float, hardware: str, is_fault: bool, make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    times = ("step_time_ms", "data_time_ms", "forward_backward_time_ms", "optimizer_time_ms")
    columns = {name: make_record().values(name) * factor for name in times}
    record = make_record(columns=columns, info={"ended_at": None})
    faults = found(record, policy, hardware, baseline)[0]
    assert bool(faults) == is_fault
    if is_fault:
        assert faults[0].startswith("median step ")
        assert faults[0].endswith("a mistaken unit?")
    assert found(record, policy, hardware)[0] == []
