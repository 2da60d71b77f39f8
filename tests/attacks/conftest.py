# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from harness.baselines import Baseline, BaselineKey, baseline_of_records
from harness.policy import Policy, load_policy
from harness.records import load_record
from suites.detection.synthetic import SyntheticRun, recipe_of, write_synthetic_run


@pytest.fixture(scope="session")
def policy() -> Policy:
    return load_policy()


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Baseline:
    """Three launches of one recipe: the same batches, other run noise."""
    folder = tmp_path_factory.mktemp("baseline")
    runs = [SyntheticRun(run_seed=seed) for seed in (1, 2, 3)]
    records = [load_record(write_synthetic_run(folder / str(run.run_seed), run)) for run in runs]
    key = BaselineKey(
        suite="convergence", case="synthetic", recipe_sha=recipe_of(runs[0]).sha(), hardware="cpu"
    )
    return baseline_of_records(records, key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00")


@pytest.fixture
def seed_log(tmp_path: Path) -> Path:
    """The four published lines of a Qwen2.5-VL-7B fine-tune."""
    path = tmp_path / "published.log"
    path.write_text(
        "".join(
            f"[2025-10-24 09:{clock}] iteration {n:8d}/     500 | consumed samples: {n * 64:12d} | "
            f"elapsed time per iteration (ms): {ms} | throughput per GPU (TFLOP/s/GPU): {tflops} | "
            f"learning rate: 1.000000E-06 | global batch size:    64 | lm loss: {loss} | loss scale: 1.0 | "
            f"grad norm: {norm} | tokens/sec/gpu: {tokens} | number of skipped iterations:   0 | "
            "number of nan iterations:   0 |\n"
            for clock, n, ms, tflops, loss, norm, tokens in (
                ("52:15", 480, "5533.0", "560.9", "1.605485E+00", "17.924", "11844.5"),
                ("52:21", 481, "5859.3", "529.7", "1.770668E+00", "18.098", "11185.0"),
                ("52:27", 482, "5546.0", "559.6", "1.682535E+00", "9.632", "11816.9"),
                ("54:09", 500, "5622.0", "552.0", "1.596570E+00", "11.199", "11657.0"),
            )
        )
    )
    return path
