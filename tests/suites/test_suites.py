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


def test_cases_of_the_throughput_suite_fit_and_keep_every_rule(tmp_path: Path) -> None:
    site = Site(checkpoints=str(tmp_path), datasets=str(tmp_path))
    planned = [plan_case(case, site) for case in discover(SUITES / "throughput")]
    assert {row.case.recipe.num_processes for row in planned} == {1, 2, 4, 8}
    assert {row.case.hardware for row in planned} >= {"cpu", "h20", "h100", "h800", "h200"}
    assert {row.case.id: row.refused for row in planned if row.refused} == {}
    fixed = [row for row in planned if row.case.recipe.data.fixed_shapes is not None]
    assert len({row.case.name for row in fixed}) >= 15
    for row in fixed:  # of a fresh site, everything is made on the spot
        assert len(row.missing) == 1
        assert "made on the spot" in row.missing[0]


def test_inputs_of_cpu_cases_are_made_on_the_spot() -> None:
    cpu = [case for case in discover(SUITES) if case.hardware == "cpu"]
    assert {case.recipe.model.checkpoint for case in cpu} <= set(CHECKPOINTS)
    assert {case.recipe.data.dataset for case in cpu} <= set(DATASETS)


def test_smoke_names_cases_that_exist() -> None:
    assert set(CASES) <= {case.id for case in discover(SUITES)}


def test_suites_collect() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "suites", "-m", "cpu or h20", "--plan", "-q", "-p", "no:cacheprovider"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "@cpu" in done.stdout
    assert "@h20" in done.stdout


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
