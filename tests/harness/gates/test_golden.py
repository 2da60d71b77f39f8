# SPDX-License-Identifier: Apache-2.0
"""Every field that a gate returns, pinned: name, status, whether it blocks, wording and numbers, on fixed records.

The other tests of this folder say why a result is right; these notice any other change. After a change that is meant,
`QWEN_HARNESS_UPDATE_GOLDEN=1 pytest tests/harness/gates/test_golden.py` writes the files anew: read the difference.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.baselines import Baseline
from harness.gates.convergence import end_window, first_forward, first_steps, held_out, literal
from harness.gates.inference import judge_inference
from harness.gates.memory import memory
from harness.gates.pairing import Pairing, pair
from harness.gates.plausibility import plausibility
from harness.gates.sanity import sanity
from harness.gates.throughput import published_arithmetic, published_throughput, throughput
from harness.gates.trajectory import drift, shape
from harness.policy import Policy
from harness.records import RunRecord
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS
from harness.verdict import GateResult
from tests.harness.gates.test_inference import BASE, BLANK, evaluation

GOLDEN = Path(__file__).parent / "golden"
UPDATES = bool(os.environ.get("QWEN_HARNESS_UPDATE_GOLDEN"))
MakeRecord = Callable[..., RunRecord]
MakeBaseline = Callable[..., Baseline]
PAIRED = Pairing(mode="paired", reason="same samples")
UNPAIRED = Pairing(mode="unpaired", reason="other samples")
REFUSED = Pairing(mode="refused", reason="iterations differ")


def check(name: str, results: dict[str, GateResult | Pairing]) -> None:
    """Compare with the golden file: words exactly, numbers to 1e-6."""
    found = {
        case: result.to_dict() if isinstance(result, GateResult) else [result.mode, result.reason]
        for case, result in results.items()
    }
    file = GOLDEN / f"{name}.json"
    if UPDATES:
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    wanted = json.loads(file.read_text(encoding="utf-8"))
    assert found.keys() == wanted.keys()
    for case in found:
        assert_like(json.loads(json.dumps(found[case])), wanted[case], f"{name}: {case}")


def assert_like(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_like(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_like(one, other, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12), where
    else:
        assert found == wanted, where


def scaled(record: RunRecord, **factors: Any) -> RunRecord:
    """A record with columns multiplied."""
    series = record.series.assign(**{name: record.values(name) * factor for name, factor in factors.items()})
    return replace(record, series=series)


def cut(record: RunRecord, count: int) -> RunRecord:
    """Its first iterations."""
    return replace(record, series=record.series.iloc[:count])


def beside_hf(record: RunRecord, loss: float) -> RunRecord:
    """A record that also holds transformers' loss of the first batch."""
    series = record.series.assign(**{"extra.hf_lm_loss": loss})
    return replace(record, series=series, known=record.known | {"extra.hf_lm_loss"})


def with_columns(baseline: Baseline, *names: str) -> Baseline:
    """A baseline that holds only these columns."""
    runs = tuple(
        run.model_copy(update={"columns": {name: run.columns[name] for name in names}})
        for run in baseline.runs
    )
    return baseline.model_copy(update={"runs": runs})


def test_convergence(make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy) -> None:
    one, three, five = (make_baseline(num_runs=count) for count in (1, 3, 5))
    record = make_record(seed=6)
    ramp = np.linspace(0.98, 1.03, 80)
    early = np.r_[np.full(78, math.nan), 1.6, math.nan]
    check("convergence", {
        "C1": first_forward(record, three, policy, PAIRED, same_hardware=True),
        "C1 other hardware": first_forward(record, one, policy, PAIRED, same_hardware=False),
        "C1 unpaired": first_forward(record, three, policy, UNPAIRED, same_hardware=True),
        "C1 transformers": first_forward(beside_hf(record, 2.0), three, policy, PAIRED, same_hardware=True),
        "C1 no transformers": first_forward(beside_hf(record, 0.0), three, policy, PAIRED, same_hardware=True),
        "C2": first_steps(record, three, policy, PAIRED),
        "C2 ramp": first_steps(scaled(record, lm_loss=ramp), one, policy, PAIRED),
        "C2 gradients": first_steps(scaled(record, grad_norm=1.7), three, policy, PAIRED),
        "C2 unpaired": first_steps(record, three, policy, UNPAIRED),
        "C3": end_window(record, three, policy, PAIRED),
        "C3 ramp": end_window(scaled(record, lm_loss=ramp), three, policy, PAIRED),
        "C3 one reference": end_window(record, one, policy, PAIRED, factor=1.5),
        "C3 window": end_window(record, three, policy, PAIRED, window=(11, 40)),
        "C3 no window": end_window(record, three, policy, PAIRED, window=(75, 95)),
        "C3 refused": end_window(record, three, policy, REFUSED),
        "C3 unpaired": end_window(record, five, policy, UNPAIRED),
        "C3 unpaired, few": end_window(record, three, policy, UNPAIRED),
        "C3 short": end_window(cut(record, 49), three, policy, PAIRED),
        "literal": literal(record, three, policy, blocks=True),
        "literal off": literal(scaled(record, lm_loss=1.07), one, policy, blocks=False),
        "literal lost": literal(cut(record, 79), three, policy, blocks=True),
        "literal beyond": literal(replace(record, planned_iterations=81), three, policy, blocks=True),
        "C6": held_out(record, three, policy),
        "C6 off": held_out(scaled(record, eval_lm_loss=1.1), one, policy),
        "C6 early": held_out(make_record(columns={"eval_lm_loss": early}), three, policy),
        "C6 none": held_out(make_record(columns={"eval_lm_loss": None}), three, policy),
        "C6 no reference": held_out(record, with_columns(three, "lm_loss"), policy),
    })  # fmt: skip


def test_trajectory(make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy) -> None:
    one, three = make_baseline(num_runs=1), make_baseline(num_runs=3)
    record = make_record(seed=5)
    bump = np.ones(80)
    bump[30:55] = 1.04
    unlike = three.model_copy(update={"runs": (
        *three.runs[:2], three.runs[2].model_copy(update={"data_order_digest": "another"}),
    )})  # fmt: skip
    results = {}
    for name, gate in (("C4", drift), ("C5", shape)):
        results |= {
            name: gate(record, three, policy, PAIRED),
            f"{name} bump": gate(scaled(record, lm_loss=bump), three, policy, PAIRED),
            f"{name} ramp": gate(scaled(record, lm_loss=np.linspace(0.9, 1.1, 80)), one, policy, PAIRED),
            f"{name} another order": gate(record, unlike, policy, PAIRED),
            f"{name} unpaired": gate(record, three, policy, UNPAIRED),
            f"{name} refused": gate(record, three, policy, REFUSED),
            f"{name} short": gate(cut(record, 30), three, policy, PAIRED),
        }
    check("trajectory", results)


def test_throughput_and_memory(make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy) -> None:
    one, three = make_baseline(num_runs=1), make_baseline(num_runs=3)
    record = make_record(seed=7)
    rates = {REPORTED_TOKENS: [9000.0] * 79 + [8000.0], REPORTED_TFLOPS: 400.0, "step_time_ms": 100.0}
    log = replace(make_record(columns=rates), info=None, framework="megatron_lm")
    facts = {
        "flops_per_padded_token": 400e12 * 0.1 * 8 / (64 * 8192), "global_batch_size": 64, "seq_length": 8192,
        "implied_world_size": 8, "flops_formula_id": "formula",
    }  # fmt: skip
    published = make_baseline(log).model_copy(update={"facts": facts})
    short = replace(log, series=log.series.iloc[:3])
    check("throughput", {
        "same": throughput(record, three, policy, hardware="h100"),
        "one reference": throughput(record, one, policy, hardware="h100"),
        "slow": throughput(scaled(record, step_time_ms=1.2), three, policy, hardware="h100"),
        "slower": throughput(scaled(record, step_time_ms=1.04), three, policy, hardware="h100"),
        "fast": throughput(scaled(record, step_time_ms=0.8), three, policy, hardware="h100"),
        "cpu": throughput(record, three, policy, hardware="cpu"),
        "unknown": throughput(record, three, policy, hardware=None),
        "advisory": throughput(record, three, policy, hardware="h100", advisory_because="another driver"),
        "short": throughput(cut(record, 30), three, policy, hardware="h100"),
        "no times": throughput(record, with_columns(three, "lm_loss"), policy, hardware="h100"),
        "published": published_throughput(log, published, policy),
        "published, our run": published_throughput(record, published, policy),
        "published, no tokens": published_throughput(
            make_record(columns={"num_padded_tokens": None}), published, policy
        ),
        "published, no rates": published_throughput(record, three, policy),
        "arithmetic": published_arithmetic(log, published),
        "arithmetic of three": published_arithmetic(short, published),
        "arithmetic wrong": published_arithmetic(scaled(log, step_time_ms=1.1), published),
        "arithmetic, no facts": published_arithmetic(log, three),
        "arithmetic, no rates": published_arithmetic(record, published),
        "memory": memory(record, three, policy, hardware="h100"),
        "memory cpu": memory(scaled(record, peak_memory_bytes=1.5), three, policy, hardware="cpu"),
        "memory more": memory(scaled(record, peak_memory_bytes=1.5), three, policy, hardware="h100"),
        "memory zero": memory(scaled(record, peak_memory_bytes=0.0), three, policy, hardware="h100"),
        "memory none": memory(
            make_record(columns={"peak_memory_bytes": None}), three, policy, hardware="h100"
        ),
        "memory, no reference": memory(record, with_columns(three, "lm_loss"), policy, hardware="h100"),
    })  # fmt: skip


def test_sanity(make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy) -> None:
    three = make_baseline(num_runs=3)
    record = make_record(seed=8)
    assert record.info is not None
    hole = record.series.drop(index=[7, 8])
    several = {
        "lm_loss": np.r_[np.full(40, 2.0), math.nan, np.full(39, 2.0)], "eval_lm_loss": math.inf,
        "grad_norm": np.r_[-1.0, np.ones(79)], "num_skipped_iterations": 1.0, "num_nan_iterations": 2.0,
        "learning_rate": 5e-4, "global_batch_size": 3.0, "num_real_tokens": np.r_[math.inf, np.ones(79)],
    }  # fmt: skip
    other_tokens = scaled(record, num_real_tokens=1.01, num_supervised_tokens=1.02)
    outcome = record.info.outcome.model_copy(
        update={"status": "failed", "iteration": 40, "error": "out of memory\nstack"}
    )
    broken = {
        "outcome": outcome, "world_size": 4, "recipe_sha": "0" * 64, "checkpoint_fingerprint": "other",
        "sample_counts": {"skipped": -1, "consumed": 4},
    }  # fmt: skip
    check("sanity", {
        "whole": sanity(record, policy),
        "against a baseline": sanity(record, policy, baseline=three, pairing=PAIRED),
        "hole": sanity(replace(record, series=hole), policy),
        "cut": sanity(cut(record, 70), policy),
        "empty": sanity(cut(record, 0), policy),
        "beyond": sanity(replace(record, planned_iterations=60), policy),
        "several": sanity(make_record(columns=several), policy),
        "still": sanity(make_record(columns={"lm_loss": 2.0, "grad_norm": 0.0}), policy),
        "columns lost": sanity(
            make_record(columns={"grad_norm": None, "eval_lm_loss": None, "peak_memory_bytes": None}), policy,
            baseline=three, pairing=PAIRED,
        ),
        "broken": sanity(make_record(info=broken), policy, baseline=three, pairing=PAIRED),
        "skipped": sanity(make_record(info={"sample_counts": {"skipped": 60, "consumed": 80}}), policy),
        "other tokens": sanity(other_tokens, policy, baseline=three, pairing=PAIRED),
        "other tokens, unpaired": sanity(other_tokens, policy, baseline=three, pairing=UNPAIRED),
        "no recipe": sanity(make_record(info={"recipe": {"name": "x"}}), policy),
        "excerpt": sanity(
            replace(record, series=hole, info=None), policy, accept_excerpt=True
        ),
        "tensorboard": sanity(
            replace(cut(record, 70), framework="tensorboard", planned_iterations=None), policy
        ),
        "unplanned": sanity(replace(record, planned_iterations=None), policy),
    })  # fmt: skip


def test_plausibility(make_record: MakeRecord, make_baseline: MakeBaseline, policy: Policy) -> None:
    three = make_baseline(num_runs=3)
    record = make_record(seed=5)
    wild = {
        "step_time_ms": np.r_[-1.0, np.full(79, 1e-3)], "data_time_ms": 1.0, "forward_backward_time_ms": 2.0,
        "optimizer_time_ms": 3.0, "num_real_tokens": 1e9, "num_supervised_tokens": 2e9,
        "peak_memory_bytes": 1e15, "num_vision_tokens": -1.0,
    }  # fmt: skip
    rates = {REPORTED_TOKENS: 9e9, REPORTED_TFLOPS: 5000.0}
    check("plausibility", {
        "healthy": plausibility(record, policy, hardware="cpu"),
        "healthy beside a baseline": plausibility(record, policy, hardware="cpu", baseline=three),
        "healthy, h100": plausibility(record, policy, hardware="h100"),
        "nowhere": plausibility(record, policy, hardware=None),
        "wild": plausibility(make_record(columns=wild), policy, hardware="h100", baseline=three),
        "rates": plausibility(make_record(columns=rates), policy, hardware="h100", baseline=three),
        "slow": plausibility(
            scaled(record, step_time_ms=1e4), policy, hardware="h100", baseline=three
        ),
        "clock": plausibility(
            make_record(info={"started_at": "2026-01-05T09:00:00+00:00", "ended_at": "2026-01-05T09:00:01+00:00"}),
            policy, hardware="cpu",
        ),
    })  # fmt: skip


def test_inference() -> None:
    tuned = evaluation(0.95)
    cases = {
        "learnt": (BASE, tuned, BLANK),
        "all at once": (evaluation(0.0, checkpoint="base"), evaluation(1.0), BLANK),
        "just enough": (evaluation(0.6, checkpoint="base"), evaluation(0.9), evaluation(0.3, blank=True)),
        "nothing": (BASE, evaluation(0.12), evaluation(0.95, blank=True)),
        "unclear": (BASE, tuned, evaluation(0.33, blank=True)),
        "base blanked": (replace_blank(BASE, is_blank=True), tuned, BLANK),
        "tuned blanked": (BASE, replace_blank(tuned, is_blank=True), BLANK),
        "not blanked": (BASE, tuned, evaluation(0.25)),
        "same": (tuned, tuned, BLANK),
        "another": (BASE, evaluation(0.95, checkpoint="other"), BLANK),
        "other questions": (BASE, evaluation(0.95, count=100), BLANK),
        "other questions blanked": (BASE, tuned, evaluation(0.25, blank=True, count=100)),
        "thirty": tuple(
            evaluation(share, checkpoint=name, blank=is_blank, count=30)
            for share, name, is_blank in ((0.1, "base", False), (1.0, "tuned", False), (0.2, "tuned", True))
        ),
        "few": tuple(
            evaluation(share, checkpoint=name, blank=is_blank, count=29)
            for share, name, is_blank in ((0.1, "base", False), (1.0, "tuned", False), (0.0, "tuned", True))
        ),
    }  # fmt: skip
    results = {}
    for name, evaluations in cases.items():
        improvement, blanked = judge_inference(*evaluations)
        results |= {f"{name}: improvement": improvement, f"{name}: blank": blanked}
    check("inference", results)


def replace_blank(evaluation: Any, *, is_blank: bool) -> Any:
    return evaluation.model_copy(update={"blank_images": is_blank})


def test_pairing(make_record: MakeRecord, make_baseline: MakeBaseline) -> None:
    baseline = make_baseline(num_runs=3)
    record = make_record(seed=6)
    foreign = replace(record, info=None, framework="megatron_lm")
    without = {"sample_digest": None}
    check("pairing", {
        "same": pair(record, baseline),
        "another order": pair(make_record(seed=6, info={"data_order_digest": "x"}, columns=without), baseline),
        "another step": pair(
            replace(record, series=record.series.assign(sample_digest=["x"] * 80)), baseline
        ),
        "short": pair(cut(record, 60), baseline),
        "late": pair(replace(record, series=record.series.iloc[10:]), baseline),
        "foreign": pair(replace(foreign, known=foreign.known - {"sample_digest"}), baseline),
        "foreign, other batches": pair(
            scaled(replace(foreign, known=foreign.known - {"sample_digest"}), consumed_train_samples=2), baseline
        ),
        "foreign, short": pair(cut(replace(foreign, known=foreign.known - {"sample_digest"}), 15), baseline),
    })  # fmt: skip
