# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest

from harness import session
from harness.cases import Case, cases_of_folder
from harness.launch import Attempt, LaunchResult
from harness.records import RunRecord, load_record
from harness.report.collect import GRADING_FILE, VERDICT_FILE
from harness.session import (
    CaseResult,
    SessionOptions,
    find_log,
    grade_record,
    judge_soundness,
    record_candidate,
    write_grading,
)
from harness.verdict import Verdict
from models.contract.errors import RunError
from suites.detection.synthetic import SyntheticRun, recipe_of, write_synthetic_run


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(
        suite="convergence", hardware="cpu", recipe=recipe_of(SyntheticRun()), recipe_file=tmp_path / "r.toml"
    )


def test_grade_record_without_baseline_says_so(case: Case, launches: list[RunRecord], tmp_path: Path) -> None:
    options = SessionOptions(run_root=tmp_path, baseline_dir=tmp_path / "none")
    assert grade_record(launches[0], options, case=case).verdict.name == "NO_BASELINE"


def test_judge_soundness_asks_for_no_baseline(launches: list[RunRecord], tmp_path: Path) -> None:
    options = SessionOptions(run_root=tmp_path)
    assert judge_soundness(launches[0], options, hardware="cpu").verdict.name == "PASS"


def test_judge_soundness_still_refuses_another_machine(launches: list[RunRecord], tmp_path: Path) -> None:
    options = SessionOptions(run_root=tmp_path)
    assert judge_soundness(launches[0], options, hardware="h20").verdict.name == "ENV_MISMATCH"


def test_judge_soundness_refuses_a_run_that_stopped_early(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", SyntheticRun(), change_rows=lambda rows: rows[:200])
    options = SessionOptions(run_root=tmp_path)
    assert judge_soundness(load_record(folder), options, hardware="cpu").verdict.name == "INVALID"


def test_record_candidate_is_not_in_force(case: Case, launches: list[RunRecord], tmp_path: Path) -> None:
    options = SessionOptions(run_root=tmp_path, baseline_dir=tmp_path / "baselines")
    graded = grade_record(launches[0], options, case=case)
    result = CaseResult(case=case, run_dir=tmp_path, verdict=graded.verdict, graded=graded)
    path = record_candidate(result, options)
    assert path.is_relative_to(tmp_path / "baselines" / "candidates" / "cpu" / "convergence")
    assert grade_record(launches[1], options, case=case).verdict.name == "NO_BASELINE"


def test_write_grading_keeps_the_case_of_an_earlier_grading(
    case: Case, launches: list[RunRecord], tmp_path: Path
) -> None:
    options = SessionOptions(run_root=tmp_path, baseline_dir=tmp_path / "none")
    graded = grade_record(launches[0], options, case=case)
    write_grading(tmp_path, graded, case=case, gate_mode="tost")
    write_grading(tmp_path, graded, case=None, gate_mode="literal")
    facts = json.loads((tmp_path / GRADING_FILE).read_text())
    assert (facts["case"], facts["suite"], facts["hardware"]) == (
        "convergence/synthetic@cpu",
        "convergence",
        "cpu",
    )
    assert facts["gate_mode"] == "literal"
    assert Verdict.from_dict(json.loads((tmp_path / VERDICT_FILE).read_text())) == graded.verdict


def test_find_log_takes_what_carries_the_case_name(case: Case, tmp_path: Path) -> None:
    (tmp_path / "synthetic.log").write_text("")
    assert find_log(case, tmp_path) == tmp_path / "synthetic.log"
    assert find_log(case, tmp_path / "synthetic.log") == tmp_path / "synthetic.log"
    (tmp_path / "synthetic.log").unlink()
    with pytest.raises(RunError, match="no log for case convergence/synthetic@cpu"):
        find_log(case, tmp_path)


def test_shipped_control_recipes_have_a_partner() -> None:
    from harness.cases import SUITES

    same = {"name", "description", "notes", "hardware", "checkpoint"}
    cases = cases_of_folder(SUITES / "convergence")
    recipes = [case.recipe.model_dump(exclude=same) for case in cases]
    controls = [recipe for recipe in recipes if recipe["data"]["blank_images"]]
    assert controls
    for control in controls:
        assert {**control, "data": {**control["data"], "blank_images": False}} in recipes


@pytest.mark.parametrize(
    ("asked", "kind", "expected"),
    [
        (2.0, "completed", ["before 2.0", "launch", "after 2.0"]),
        (2.0, "result", ["before 2.0", "launch"]),  # it has failed: nothing to hold its times to
        (None, "completed", ["before 0.0", "launch", "after 0.0"]),  # 0: not at all
    ],
)
def test_the_machine_is_measured_around_a_run(
    asked: float | None,
    kind: Any,
    expected: list[str],
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def launched(_: Case, run_dir: Path, **__: object) -> LaunchResult:
        calls.append("launch")
        write_synthetic_run(run_dir, SyntheticRun(train_iters=60))
        attempt = Attempt(
            number=1, started_at="", duration_s=1.0, exit_code=0, kind=kind, phase="done", last_iteration=60, reason="",
            directory=".",
        )  # fmt: skip
        return LaunchResult(run_dir=run_dir, attempts=(attempt,))

    def measured(_: Case, __: Path, when: str, *, seconds: float, **___: object) -> None:
        calls.append(f"{when} {seconds}")

    monkeypatch.setattr(session, "ensure_inputs", lambda *_: None)
    monkeypatch.setattr(session, "launch_case", launched)
    monkeypatch.setattr(session, "measure_machine", measured)
    options = SessionOptions(run_root=tmp_path / "runs", sentinel_s=asked)
    session.run_case(case, options, use_baseline=False)
    assert calls == expected
    calls.clear()
    with pytest.raises(RunError, match="already holds a run"):
        session.run_case(case, options, use_baseline=False)
    assert calls == []  # the run that is there keeps what was measured beside it
