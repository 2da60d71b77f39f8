# SPDX-License-Identifier: Apache-2.0
"""Two runs of one session, one judged against the other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.cases import SUITES, Case, cases_of_folder
from harness.partner import judge_against, partner_of, step_gaps
from harness.records import load_record
from harness.session import CaseResult, SessionOptions, judge_soundness
from models.contract.errors import RunError
from suites.detection.synthetic import Row, SyntheticRun, recipe_of, write_synthetic_run


def result_of(folder: Path, factor: float = 1.0, run_seed: int = 1) -> CaseResult:
    def change(rows: list[Row]) -> list[Row]:
        return [{**row, "lm_loss": row["lm_loss"] * factor} for row in rows]

    run = write_synthetic_run(folder, SyntheticRun(run_seed=run_seed), change_rows=change)
    case = Case(suite="s", hardware="cpu", recipe=recipe_of(SyntheticRun()), recipe_file=folder / "r.toml")
    graded = judge_soundness(load_record(run), SessionOptions(run_root=folder), hardware="cpu")
    return CaseResult(case=case, run_dir=run, verdict=graded.verdict, graded=graded)


def test_every_fsdp2_case_of_the_suite_has_a_partner() -> None:
    cases = cases_of_folder(SUITES / "cross_engine")
    with_fsdp2 = [case for case in cases if case.recipe.train.engine == "fsdp2"]
    assert len(with_fsdp2) == 4
    for case in with_fsdp2:
        partner = partner_of(case, cases, "train", engine="megatron")
        assert partner.name == case.name.removesuffix("_fsdp2")
        assert case.recipe.train.train_iters == 500
    lonely = [case for case in cases if case.recipe.train.engine == "fsdp2"]
    with pytest.raises(RunError, match="differs from"):
        partner_of(with_fsdp2[0], lonely, "train", engine="megatron")


def test_judge_against_compares_loss_alone_and_draws_both(tmp_path: Path) -> None:
    result, partner = result_of(tmp_path / "a"), result_of(tmp_path / "b", run_seed=2)
    graded = judge_against(result, partner, SessionOptions(run_root=tmp_path))
    assert graded.verdict.name == "PASS"
    assert not {gate.gate for gate in graded.verdict.gates} & {"throughput", "memory"}
    drawn = json.loads((result.run_dir / "grading.json").read_text())["reference"]
    assert partner.graded is not None
    assert drawn["mean"] == pytest.approx(partner.graded.record.values("lm_loss").tolist())


def test_judge_against_sees_a_curve_that_ends_higher(tmp_path: Path) -> None:
    worse = result_of(tmp_path / "a", factor=1.1)
    graded = judge_against(worse, result_of(tmp_path / "b"), SessionOptions(run_root=tmp_path))
    assert graded.verdict.name == "REGRESSION"


def test_step_gaps_are_relative_and_want_the_same_samples(tmp_path: Path) -> None:
    a, b = result_of(tmp_path / "a", factor=1.01), result_of(tmp_path / "b")
    assert a.graded is not None
    assert b.graded is not None
    np.testing.assert_allclose(step_gaps(a.graded.record, b.graded.record), 0.01, rtol=1e-6)
    shuffled = b.graded.record.series.assign(sample_digest="other")
    with pytest.raises(RunError, match="saw other samples"):
        step_gaps(a.graded.record, replace(b.graded.record, series=shuffled))


def test_a_run_that_never_trained_is_refused(tmp_path: Path) -> None:
    a = result_of(tmp_path / "a")
    with pytest.raises(RunError, match="never trained"):
        judge_against(a, replace(a, graded=None), SessionOptions(run_root=tmp_path))
