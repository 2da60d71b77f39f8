# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.baselines import Baseline
from harness.gates.pairing import Pairing, pair
from harness.gates.sanity import planned_learning_rate, sanity
from harness.policy import Policy
from harness.records import RunRecord
from models.contract.recipe import parse_recipe
from models.contract.record import RunOutcome

MakeRecord = Callable[..., RunRecord]


def at(record: RunRecord, column: str, **values: float) -> list[float]:
    """A column with values changed at iterations: at(record, "lm_loss", i7=0.0)."""
    cells = record.values(column).tolist()
    for key, value in values.items():
        cells[int(key[1:]) - 1] = value
    return cells


def faults(record: RunRecord, policy: Policy, **options: Any) -> list[str]:
    gate = sanity(record, policy, **options)
    assert gate.gate == "C0"
    assert gate.blocks is True
    assert gate.status == (
        "invalid" if gate.details["faults"] else "warn" if gate.details["warnings"] else "pass"
    )
    assert (
        gate.summary == "; ".join([*gate.details["faults"], *gate.details["warnings"]])
        or gate.status == "pass"
    )
    return gate.details["faults"]


def test_whole_run_passes(make_record: MakeRecord, policy: Policy) -> None:
    gate = sanity(make_record(), policy)
    assert (gate.status, gate.summary) == ("pass", "80 iterations, all finite, as planned")


def test_problems_of_the_source_are_faults(make_record: MakeRecord, policy: Policy) -> None:
    assert faults(make_record(problems=("torn_line: 3",)), policy) == ["source: torn_line: 3"]


@pytest.mark.parametrize("name", ["lm_loss", "grad_norm", "step_time_ms", "consumed_train_samples"])
def test_columns_that_must_be_there(name: str, make_record: MakeRecord, policy: Policy) -> None:
    assert faults(make_record(columns={name: None}), policy)[0] == f"metrics missing: {name}"


def test_two_missing_columns_are_both_named(make_record: MakeRecord, policy: Policy) -> None:
    record = make_record(columns={"lm_loss": None, "grad_norm": None})
    assert faults(record, policy)[0] == "metrics missing: lm_loss, grad_norm"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lm_loss", math.nan, "lm_loss is nan at iteration 7 (1 iterations)"),
        ("grad_norm", math.inf, "grad_norm is inf at iteration 7 (1 iterations)"),
        ("step_time_ms", -math.inf, "step_time_ms is -inf at iteration 7 (1 iterations)"),
        ("consumed_train_samples", math.nan, "consumed_train_samples is nan at iteration 7 (1 iterations)"),
        ("learning_rate", math.nan, "learning_rate is nan at iteration 7 (1 iterations)"),
        ("num_real_tokens", math.inf, "num_real_tokens is inf at iteration 7 (1 iterations)"),
        ("num_padded_tokens", math.inf, "num_padded_tokens is inf at iteration 7 (1 iterations)"),
        ("num_supervised_tokens", math.inf, "num_supervised_tokens is inf at iteration 7 (1 iterations)"),
        ("model_flops", math.inf, "model_flops is inf at iteration 7 (1 iterations)"),
        ("lm_loss", 0.0, "lm_loss is 0.0 at iteration 7"),
        ("lm_loss", -1.0, "lm_loss is -1.0 at iteration 7"),
        ("grad_norm", -1e-9, "grad_norm is negative"),
        ("num_skipped_iterations", 1.0, "num_skipped_iterations = 1, at most 0 allowed"),
        ("num_nan_iterations", 2.0, "num_nan_iterations = 2, at most 0 allowed"),
        ("consumed_train_samples", 57.0, "consumed samples are 57 at iteration 7, 56 by the batch size"),
        ("global_batch_size", 9.0, "global batch size departs from the recipe's at iteration 7"),
    ],
)
def test_bad_value_is_named_with_its_iteration(
    name: str, value: float, text: str, make_record: MakeRecord, policy: Policy
) -> None:
    record = make_record(columns={name: at(make_record(), name, i7=value)})
    assert text in faults(record, policy)


def test_bad_values_are_counted(make_record: MakeRecord, policy: Policy) -> None:
    record = make_record(
        columns={"lm_loss": at(make_record(), "lm_loss", i7=math.nan, i9=math.nan, i80=math.nan)}
    )
    assert faults(record, policy) == ["lm_loss is nan at iteration 7 (3 iterations)"]


def test_foreign_log_may_lack_what_it_does_not_log_every_time(
    make_record: MakeRecord, policy: Policy
) -> None:
    columns = {"model_flops": at(make_record(), "model_flops", i7=math.nan)}
    record = make_record(columns=columns)
    assert len(faults(record, policy)) == 1
    assert faults(replace(record, framework="megatron_lm", info=None), policy) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"i80": math.inf}, ["eval_lm_loss is not finite"]),
        ({"i80": math.nan}, ["eval_lm_loss is not finite"]),
        ({"i40": 1.6}, []),
    ],
)
def test_held_out_loss_may_be_rare_but_not_absent(
    values: dict[str, float], text: list[str], make_record: MakeRecord, policy: Policy
) -> None:
    record = make_record(columns={"eval_lm_loss": at(make_record(), "eval_lm_loss", **values)})
    assert faults(record, policy) == text


@pytest.mark.parametrize(("count", "is_fault"), [(5, True), (4, False)])
def test_loss_that_never_moves(count: int, is_fault: bool, make_record: MakeRecord, policy: Policy) -> None:
    whole = make_record(columns={"lm_loss": [2.5] * 80})
    record = replace(whole, series=whole.series.iloc[:count], planned_iterations=count)
    text = "lm_loss is 2.5 at every iteration: nothing is being trained or measured"
    assert (text in faults(record, policy)) == is_fault


def test_gradient_that_is_always_zero(make_record: MakeRecord, policy: Policy) -> None:
    record = make_record(columns={"grad_norm": [0.0] * 80})
    assert faults(record, policy) == ["grad_norm is 0 at every iteration: nothing is being trained"]
    assert faults(make_record(columns={"grad_norm": [0.0] * 79 + [1.0]}), policy) == []


@pytest.mark.parametrize(
    ("rows", "planned", "interval", "text"),
    [
        (slice(0, 79), 80, 1, ["79 of 80 iterations: 80 is the first that is missing"]),
        (slice(1, 80), 80, 1, ["79 of 80 iterations: 1 is the first that is missing"]),
        (slice(0, 80), 79, 1, ["iteration 80 is beyond the planned 79"]),
        (slice(0, 80), 82, 1, ["80 of 82 iterations: 81 is the first that is missing"]),
        (slice(9, 80, 10), 80, 10, []),
        (slice(0, 80, 10), 80, 10, ["8 of 9 iterations: 80 is the first that is missing"]),
        (slice(9, 70, 10), 80, 10, ["7 of 8 iterations: 80 is the first that is missing"]),
        (slice(0, 0), 80, 1, ["no iterations"]),
        (slice(0, 80), None, 1, ["planned number of iterations unknown; the record ends at 80"]),
    ],
)
def test_iterations_that_are_missing(
    rows: slice, planned: int | None, interval: int, text: list[str], make_record: MakeRecord, policy: Policy
) -> None:
    whole = make_record()
    record = replace(
        whole, series=whole.series.iloc[rows], planned_iterations=planned, log_interval=interval, info=None,
        framework="megatron_lm",
    )  # fmt: skip
    assert [fault for fault in faults(record, policy) if not fault.startswith("eval_lm_loss")] == text


def test_tensorboard_plans_what_it_has(make_record: MakeRecord, policy: Policy) -> None:
    record = make_record(planned_iterations=None, framework="tensorboard")
    assert faults(replace(record, info=None), policy) == []
    holed = replace(record, info=None, series=record.series.drop(index=9))
    assert faults(holed, policy) == ["79 of 80 iterations: 9 is the first that is missing"]


def test_excerpt_of_a_foreign_log_is_accepted_for_the_literal_rule_alone(
    make_record: MakeRecord, policy: Policy
) -> None:
    whole = replace(make_record(), framework="megatron_lm", info=None)
    excerpt = replace(whole, series=whole.series.iloc[70:])
    text = "10 of 80 iterations: 1 is the first that is missing"
    assert faults(excerpt, policy) == [text]
    gate = sanity(excerpt, policy, accept_excerpt=True)
    assert (gate.status, gate.details["warnings"]) == ("warn", [text])
    # Without its last iteration, or as our own run directory, it is none.
    assert faults(replace(whole, series=whole.series.iloc[60:79]), policy, accept_excerpt=True)
    assert faults(make_record(series=whole.series.iloc[70:]), policy, accept_excerpt=True)


def test_growing_batch_only_has_to_grow(make_record: MakeRecord, policy: Policy) -> None:
    sizes = [8.0] * 40 + [16.0] * 40
    record = replace(
        make_record(columns={"global_batch_size": sizes, "consumed_train_samples": np.cumsum(sizes)}),
        info=None,
    )
    assert faults(record, policy) == []
    stuck = record.series.assign(consumed_train_samples=[*np.cumsum(sizes)[:79], np.cumsum(sizes)[78]])
    assert faults(replace(record, series=stuck), policy) == ["consumed samples do not grow"]


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (
            {"outcome": RunOutcome(status="failed", iteration=80, error="boom\nmore")},
            "the run is failed at iteration 80: boom",
        ),
        ({"outcome": RunOutcome(status="running", iteration=80)}, "the run is running at iteration 80"),
        (
            {"sample_counts": {"consumed": 90, "skipped": 10}},
            "10 of 100 samples were skipped, at most 5% allowed",
        ),
        ({"sample_counts": {"consumed": -1}}, "sample count consumed is -1"),
        ({"recipe_sha": "0" * 16}, "recipe hash is 0000000000000000, its content gives "),
        ({"world_size": 8}, "world size is 8, the recipe plans 1"),
        ({"recipe": {}}, "the stored recipe is not one of this version: "),
    ],
)
def test_run_info_that_is_not_as_planned(
    info: dict[str, Any], text: str, make_record: MakeRecord, policy: Policy
) -> None:
    found = faults(make_record(info=info), policy)
    assert len(found) == 1
    assert found[0].startswith(text)


def test_few_skipped_samples_are_allowed(make_record: MakeRecord, policy: Policy) -> None:
    assert faults(make_record(info={"sample_counts": {"consumed": 95, "skipped": 5}}), policy) == []
    assert faults(make_record(info={"sample_counts": {}}), policy) == []


def test_learning_rate_may_be_logged_a_step_late_but_not_off(make_record: MakeRecord, policy: Policy) -> None:
    record = make_record()
    recipe = parse_recipe(record.recipe, where="test")
    late = [planned_learning_rate(recipe, i) for i in range(1, 81)]
    assert faults(make_record(columns={"learning_rate": late}), policy) == []
    later = [planned_learning_rate(recipe, i + 1) for i in range(1, 81)]
    assert len(faults(make_record(columns={"learning_rate": later}), policy)) == 1
    once = at(record, "learning_rate", i30=record.values("learning_rate")[29] * 1.001)
    (text,) = faults(make_record(columns={"learning_rate": once}), policy)
    assert text.startswith(f"learning rate is {once[29]:.6g} at iteration 30, the recipe plans ")
    assert faults(make_record(columns={"learning_rate": None}), policy) == []


def lr(style: str, **optimizer: Any) -> list[float]:
    recipe = parse_recipe(
        {
            "name": "a", "num_processes": 1, "model": {"family": "qwen2_5_vl", "checkpoint": "c"},
            "data": {"dataset": "d", "seq_length": 16},
            "train": {"train_iters": 100, "micro_batch_size": 1, "global_batch_size": 1},
            "optimizer": {"lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 10, "lr_decay_style": style} | optimizer,
        },
        where="test",
    )  # fmt: skip
    return [planned_learning_rate(recipe, step) for step in (0, 5, 10, 55, 100, 101)]


def test_schedule_is_megatrons() -> None:
    assert lr("cosine") == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert lr("linear") == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert lr("constant") == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert lr("cosine", lr_warmup_iters=0)[0] == 1.0
    quarter = lr("cosine")[3]
    assert quarter == pytest.approx(0.1 + 0.9 * 0.5 * (math.cos(math.pi * 0.5) + 1))


def test_what_the_baseline_has_the_run_must_have(
    make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    for name in ("eval_lm_loss", "peak_memory_bytes"):
        record = make_record(columns={name: None})
        assert faults(record, policy, baseline=baseline) == [f"the baseline has {name}, the run does not"]
        assert faults(replace(record, framework="megatron_lm", info=None), policy, baseline=baseline) == []


def test_same_recipe_needs_the_same_data(make_record: MakeRecord, baseline: Baseline, policy: Policy) -> None:
    other = Pairing(mode="unpaired", reason="data order differs from iteration 3 on")
    same = pair(make_record(), baseline)
    assert same.mode == "paired"
    assert faults(make_record(), policy, baseline=baseline, pairing=same) == []
    assert faults(make_record(), policy, baseline=baseline, pairing=other) == [
        "same recipe, other data: data order differs from iteration 3 on"
    ]
    elsewhere = baseline.model_copy(update={"key": baseline.key.model_copy(update={"recipe_sha": "other"})})
    assert faults(make_record(), policy, baseline=elsewhere, pairing=other) == []


@pytest.mark.parametrize(
    "name",
    ["num_padded_tokens", "num_real_tokens", "num_supervised_tokens", "num_vision_tokens", "model_flops"],
)
def test_same_samples_have_the_same_counts(
    name: str, make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    record = make_record(columns={name: at(make_record(), name, i7=make_record().values(name)[6] * 1.1)})
    found = faults(record, policy, baseline=baseline, pairing=pair(record, baseline))
    assert any(
        fault.startswith(f"{name} is ")
        and fault.endswith(" in the baseline for the same samples")
        and "at iteration 7, " in fault
        for fault in found
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("checkpoint_fingerprint", "checkpoint fingerprint differs from the baseline's"),
        ("dataset_fingerprint", "dataset fingerprint differs from the baseline's"),
    ],
)
def test_other_inputs_are_a_warning(
    name: str, text: str, make_record: MakeRecord, baseline: Baseline, policy: Policy
) -> None:
    gate = sanity(make_record(info={name: "other"}), policy, baseline=baseline)
    assert (gate.status, gate.details["warnings"]) == ("warn", [text])
    assert sanity(make_record(info={name: None}), policy, baseline=baseline).status == "pass"
