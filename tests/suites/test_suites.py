# SPDX-License-Identifier: Apache-2.0
"""Every shipped suite is planned here, and the example pipelines are read: neither may rot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from harness.assets import CHECKPOINTS, DATASETS
from harness.cases import SUITES, discover
from harness.cli.app import app
from harness.hardware import REPOSITORY
from harness.plan import plan_case, plan_text
from harness.smoke import CASES
from models.contract.site import Site

PIPELINES = sorted((REPOSITORY / "docs" / "ci").glob("*.yml"))


def test_every_case_can_be_planned(tmp_path: Path) -> None:
    cases = discover(SUITES)
    site = Site(checkpoints=str(tmp_path), datasets=str(tmp_path))
    text = plan_text([plan_case(case, site) for case in cases])
    assert all(case.id in text for case in cases)
    assert f"{len(cases)} case(s)" in text


def test_inputs_of_cpu_cases_are_made_on_the_spot() -> None:
    cpu = [case for case in discover(SUITES) if case.hardware == "cpu"]
    assert {case.recipe.model.checkpoint for case in cpu} <= set(CHECKPOINTS)
    assert {case.recipe.data.dataset for case in cpu} <= set(DATASETS)


def test_smoke_names_cases_that_exist() -> None:
    assert set(CASES) <= {case.id for case in discover(SUITES)}


@pytest.mark.parametrize("marker", ["cpu", "h20"])
def test_suites_collect(marker: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "suites", "-m", marker, "--plan", "-q", "-p", "no:cacheprovider"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"@{marker}" in done.stdout


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.name)
def test_pipelines_name_targets_verbs_and_options_that_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert YAML(typ="safe").load(text)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    verbs = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for verb in re.findall(r"qwen-harness (\w+)", re.sub(r"/etc/qwen-harness\S*", "", text)):
        assert verb in verbs
    plugin = (REPOSITORY / "harness" / "plugin.py").read_text(encoding="utf-8")
    for option in set(re.findall(r"--(?!junitxml)[a-z][a-z-]+", text)):
        assert f'"{option}"' in plugin, option
