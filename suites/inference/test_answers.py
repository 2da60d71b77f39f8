# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning teaches the model to look: held-out answers become right, and blanking the pictures undoes it.

The recipes beside this file make no case of their own (their names start with an underscore): nothing about their speed
or loss is judged, only what the models answer.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.assets import run_program
from harness.cases import Case, cases_of_recipe
from harness.gates.inference import judge_inference
from harness.session import CaseResult, SessionOptions
from models.contract.evaluation import read_evaluation

FINE_TUNES = (
    pytest.param("_tiny_qwen3_vl.toml", id="qwen3_vl", marks=pytest.mark.cpu),
    pytest.param("_tiny_qwen2_5_vl.toml", id="qwen2_5_vl", marks=pytest.mark.slow),
)


@pytest.fixture
def fine_tune(request: pytest.FixtureRequest, results_of: Callable[[Case], list[CaseResult]]) -> CaseResult:
    (case,) = cases_of_recipe(Path(__file__).with_name(request.param))
    result = results_of(case)[0]
    assert result.launched is not None
    assert result.launched.completed, result.launched.last.reason
    return result


@pytest.mark.parametrize("fine_tune", FINE_TUNES, indirect=True)
def test_answers_become_right_and_need_the_pictures(
    fine_tune: CaseResult, artifacts: Path, session_options: SessionOptions
) -> None:
    recipe = fine_tune.case.recipe
    site = ["--site", str(session_options.site_file)] if session_options.site_file else []
    common = ["--dataset", recipe.data.dataset, *site]
    files = {name: artifacts / f"{name}.json" for name in ("base", "tuned", "blank")}
    asked = {
        "base": ["--checkpoint", recipe.model.checkpoint],
        "tuned": ["--checkpoint", str(fine_tune.run_dir)],
        "blank": ["--checkpoint", str(fine_tune.run_dir), "--blank-images"],
    }
    for name, options in asked.items():
        run_program(["models.entry.generate", "evaluate", *options, *common, "--out", str(files[name])])
    gates = judge_inference(*(read_evaluation(file) for file in files.values()))
    (artifacts / "gates.json").write_text(json.dumps([gate.to_dict() for gate in gates], indent=1) + "\n")
    shown = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    page = ["--gates", str(artifacts / "gates.json"), "--out", str(artifacts / "answers.html")]
    run_program(["models.entry.generate", "page", *shown, *page, *site])
    failed = [f"{gate.gate}: {gate.status}: {gate.summary}" for gate in gates if gate.status != "pass"]
    assert not failed, "\n".join(failed)
