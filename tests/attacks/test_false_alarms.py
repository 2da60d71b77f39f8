# SPDX-License-Identifier: Apache-2.0
"""How often the end-window test calls a healthy run bad, and how surely it finds a bad one, by resampling."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness import statistics
from harness.baselines import Baseline, BaselineKey, baseline_of_records
from harness.gates.convergence import end_window
from harness.gates.pairing import Pairing
from harness.policy import Policy
from harness.records import RunRecord, load_record
from suites.detection.synthetic import SyntheticRun, write_synthetic_run

PAIRED = Pairing(mode="paired", reason="resampled")
UNPAIRED = Pairing(mode="unpaired", reason="resampled")


@pytest.fixture(scope="module")
def quick_policy(policy: Policy) -> Policy:
    """Fewer resamples inside each of the thousand gradings."""
    return Policy.model_validate_json(
        json.dumps(policy.model_dump(mode="json") | {"bootstrap_resamples": 200})
    )


def moved(record: RunRecord, log_losses: np.ndarray) -> RunRecord:
    """The same record with another loss curve."""
    return replace(record, series=record.series.assign(lm_loss=np.exp(log_losses)))


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        pytest.param(0.0, {"pass": 1000}, id="healthy"),
        pytest.param(0.03, {"pass": 150}, id="3%"),
        pytest.param(0.075, {"fail": 150}, id="7.5%"),
        pytest.param(-0.075, {"fail": 150}, id="7.5%_lower"),
    ],
)
def test_paired_test_on_resampled_pairs(
    shift: float, expected: dict[str, int], baseline: Baseline, quick_policy: Policy, tmp_path: Path
) -> None:
    record = load_record(write_synthetic_run(tmp_path / "run", SyntheticRun(run_seed=1)))
    curves = [np.log(frame["lm_loss"].to_numpy()) for frame in baseline.frames()]
    gap = (curves[1] - curves[2])[50:]
    rng = np.random.default_rng(11)
    length = statistics.optimal_block_length(gap)
    found: Counter[str] = Counter()
    for indices in statistics.stationary_bootstrap_indices(len(gap), length, sum(expected.values()), rng)[
        :, :50
    ]:
        log_losses = np.mean(curves, axis=0)
        log_losses[-50:] += gap[indices] + np.log1p(shift)
        found[end_window(moved(record, log_losses), baseline, quick_policy, PAIRED).status] += 1
    assert found == expected


def test_unpaired_test_on_other_batches(quick_policy: Policy, tmp_path: Path) -> None:
    """Five references with other batches: healthy runs are rarely undecided and never failed; +10% is found."""
    references = [
        load_record(write_synthetic_run(tmp_path / str(seed), SyntheticRun(data_seed=seed)))
        for seed in range(1, 6)
    ]
    key = BaselineKey(suite="s", case="c", recipe_sha="", hardware="cpu")
    baseline = baseline_of_records(
        references, key=key, policy=quick_policy, created_at="2026-01-05T09:00:00+00:00"
    )
    healthy: Counter[str] = Counter()
    worse: Counter[str] = Counter()
    level = np.mean([np.log(record.values("lm_loss")) for record in references], axis=0)
    rng = np.random.default_rng(12)
    for _ in range(120):
        log_losses = level + rng.normal(0.0, 0.036, 500)
        healthy[end_window(moved(references[0], log_losses), baseline, quick_policy, UNPAIRED).status] += 1
        log_losses += np.log(1.1)
        worse[end_window(moved(references[0], log_losses), baseline, quick_policy, UNPAIRED).status] += 1
    assert healthy["fail"] == 0
    assert healthy["pass"] >= 114
    assert worse["pass"] == 0
    assert worse["fail"] >= 114


def test_literal_rule_fails_the_same_healthy_runs(baseline: Baseline) -> None:
    """The rule the equivalence test replaces: a third of healthy pairs with other batches fail it."""
    assert baseline.calibration is not None
    assert 0.1 < baseline.calibration.literal_unpaired_false_alarm_rate < 0.5
    assert baseline.calibration.literal_paired_false_alarm_rate == 0.0
