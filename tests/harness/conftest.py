# SPDX-License-Identifier: Apache-2.0

import pytest

from harness.policy import Policy, load_policy
from harness.records import RunRecord, load_record
from suites.detection.synthetic import SyntheticRun, write_synthetic_run


@pytest.fixture(scope="session")
def policy() -> Policy:
    return load_policy()


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Four launches of one recipe: the same batches, other run noise."""
    folder = tmp_path_factory.mktemp("launches")
    return [
        load_record(write_synthetic_run(folder / str(seed), SyntheticRun(run_seed=seed)))
        for seed in (1, 2, 3, 4)
    ]
