# SPDX-License-Identifier: Apache-2.0
"""Records and baselines in memory: a gate is a pure function, and its tests take milliseconds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.baselines import Baseline, BaselineKey, baseline_of_records
from harness.policy import Policy, load_policy
from harness.records import RunRecord, load_record
from suites.detection.synthetic import SyntheticRun, write_synthetic_run

ITERATIONS = 80
MakeRecord = Callable[..., RunRecord]


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The reviewed policy with fewer resamples."""
    data = load_policy().model_dump(mode="json") | {"bootstrap_resamples": 200}
    return Policy.model_validate_json(json.dumps(data))


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunRecord]:
    """Eight launches of one recipe, read once."""
    folder: Path = tmp_path_factory.mktemp("healthy")
    runs = {seed: SyntheticRun(run_seed=seed, train_iters=ITERATIONS) for seed in range(1, 9)}
    return {seed: load_record(write_synthetic_run(folder / str(seed), run)) for seed, run in runs.items()}


@pytest.fixture
def make_record(healthy: dict[int, RunRecord]) -> MakeRecord:
    """A healthy record with columns, facts of run.json or fields of the record changed."""

    def make(
        seed: int = 4,
        columns: dict[str, Any] | None = None,
        info: dict[str, Any] | None = None,
        **fields: Any,
    ) -> RunRecord:
        base = healthy[seed]
        series = base.series.copy()
        known = set(base.known)
        for name, values in (columns or {}).items():
            if values is None:
                known.discard(name)
            else:
                series[name] = values
                known.add(name)
        assert base.info is not None
        changed = base.info.model_copy(update=info) if info else base.info
        return replace(base, **({"series": series, "known": frozenset(known), "info": changed} | fields))

    return make


@pytest.fixture(scope="session")
def make_baseline(healthy: dict[int, RunRecord], policy: Policy) -> Callable[..., Baseline]:
    """A baseline of healthy launches, or of the records given."""

    def make(*records: RunRecord, num_runs: int = 3) -> Baseline:
        chosen = list(records) or [healthy[seed] for seed in range(1, num_runs + 1)]
        sha = chosen[0].info.recipe_sha if chosen[0].info else ""
        key = BaselineKey(suite="s", case="c", recipe_sha=sha, hardware="cpu")
        return baseline_of_records(chosen, key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00")

    return make


@pytest.fixture(scope="session")
def baseline(make_baseline: Callable[..., Baseline]) -> Baseline:
    """Three launches."""
    return make_baseline()
