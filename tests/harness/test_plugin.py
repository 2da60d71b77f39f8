# SPDX-License-Identifier: Apache-2.0
"""The plugin, in pytest processes of its own, on suites that grade logs and start nothing."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from harness.baselines import BaselineKey, baseline_of_records
from harness.baselines.store import baseline_path, write_baseline
from harness.hardware import REPOSITORY
from harness.policy import Policy
from harness.records import RunRecord, load_record
from models.contract.record import METRICS_FILE
from suites.detection.synthetic import Row, SyntheticRun, recipe_of, write_synthetic_run

TEST = """
def test_loss(case_result, settle):
    settle(case_result)
"""


def to_toml(data: dict[str, object], prefix: str = "") -> str:
    """A recipe as TOML; nested tables one level deep are all it needs."""
    plain = {key: value for key, value in data.items() if value is not None and not isinstance(value, dict)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items())
    for key, value in data.items():
        if isinstance(value, dict):
            text += f"\n[{prefix}{key}]\n" + to_toml(value, f"{prefix}{key}.")
    return text


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of one recipe for a CPU and an H20, whose logs are looked for under `logs/`."""
    folder = tmp_path / "suites" / "convergence"
    folder.mkdir(parents=True)
    recipe = recipe_of(SyntheticRun()).model_dump(mode="json") | {"hardware": ["cpu", "h20"]}
    (folder / "synthetic.toml").write_text(to_toml(recipe))
    (folder / "test_convergence.py").write_text(TEST)
    return folder


def run_pytest(folder: Path, *options: str, ci: bool = False) -> subprocess.CompletedProcess[str]:
    """A pytest process in `folder`'s parent, with the plugin as it is installed."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_ACTIONS", "GITLAB_CI")
    }
    environment |= {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"} | ({"CI": "1"} if ci else {})
    where = ["--run-root", str(folder.parents[1] / "runs"), "--report-dir", str(folder.parents[1] / "report")]
    base = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider", "--strict-markers", "-rA"]
    return subprocess.run(
        [*base, *where, *options],
        cwd=folder.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


FOREIGN = (
    " iteration {number:8d}/      40 | consumed samples: {number:12d} | elapsed time per iteration (ms): 100.0 | "
    "learning rate: 1.0E-05 | global batch size: 1 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.000 | "
    "number of skipped iterations: 0 | number of nan iterations: 0 |"
)


def put_baseline(folder: Path, launches: list[RunRecord], policy: Policy) -> Path:
    """Baseline of the suite's case from healthy launches."""
    directory = folder.parents[1] / "baselines"
    info = launches[0].info
    assert info is not None
    key = BaselineKey(suite="convergence", case="synthetic", recipe_sha=info.recipe_sha, hardware="cpu")
    baseline = baseline_of_records(
        launches[:3], key=key, policy=policy, created_at="2026-01-06T00:00:00+00:00"
    )
    write_baseline(baseline, baseline_path(directory, key))
    return directory


def test_wrong_machine_is_one_line_and_its_own_exit_code(suite: Path, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    done = run_pytest(suite, "-m", "h20", "--junitxml", str(junit))
    assert done.returncode == 14
    lines = [line for line in done.stdout.splitlines() if "ENV_MISMATCH" in line]
    assert len(lines) == 1
    assert "h20 was asked for and this host is not one" in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    root = ET.parse(junit).getroot()
    assert [(node.get("errors"), node.get("tests")) for node in root.iter("testsuite")] == [("1", "1")]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [
    ("-m", "h20 and qwen2_5_vl"),
    pytest.param(("--hw", "h20"), marks=pytest.mark.slow),
    pytest.param(("-m", "b200"), marks=pytest.mark.slow),
])  # fmt: skip
def test_wrong_machine_is_never_green(options: tuple[str, ...], suite: Path) -> None:
    assert run_pytest(suite, *options).returncode == 14


def test_healthy_log_passes_and_ends_in_a_report(
    suite: Path, launches: list[RunRecord], policy: Policy, tmp_path: Path
) -> None:
    baselines = put_baseline(suite, launches, policy)
    junit = tmp_path / "junit.xml"
    metrics = Path(launches[3].source) / METRICS_FILE  # one of a run's files stands for the run
    options = ("-m", "cpu", "--from-logs", str(metrics), "--baseline-dir", str(baselines))
    done = run_pytest(suite, *options, "--junitxml", str(junit), ci=True)
    assert done.returncode == 0, done.stdout
    properties = {item.get("name"): item.get("value") for item in ET.parse(junit).getroot().iter("property")}
    assert properties["verdict"] == "PASS"
    assert properties["match_level"] == "exact"
    assert properties["C3.status"] == "pass"
    assert properties["retried"] == "0"
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(case["case"], case["verdict"]["name"]) for case in report["cases"]] == [
        ("convergence/synthetic@cpu", "PASS")
    ]
    kept = load_record(tmp_path / "runs" / "convergence" / "synthetic@cpu")
    assert kept.series.equals(launches[3].series)
    assert kept.info == launches[3].info


def test_report_shows_a_foreign_log_and_leaves_it_alone(suite: Path, tmp_path: Path) -> None:
    log = tmp_path / "theirs.log"
    log.write_text("\n".join(FOREIGN.format(number=number, loss=3 - number / 100) for number in range(1, 41)))
    before = log.read_bytes()
    where = ("-m", "cpu", "--from-logs", str(log), "--missing-baseline", "skip")
    done = run_pytest(suite, *where, "--baseline-dir", str(tmp_path / "none"))
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [case["verdict"]["name"] for case in report["cases"]] == ["NO_BASELINE"]
    html = (tmp_path / "report" / "report.html").read_text()
    assert "megatron_lm" in html
    assert "2.7950" in html  # the mean of its losses
    assert (log.read_bytes(), [file.name for file in tmp_path.glob("theirs*")]) == (before, ["theirs.log"])
    again = run_pytest(suite, *where, "--baseline-dir", str(tmp_path / "none"))
    assert again.returncode == 0, again.stdout


def test_regression_fails_the_test_and_names_the_effect(
    suite: Path, launches: list[RunRecord], policy: Policy, tmp_path: Path
) -> None:
    def worse(rows: list[Row]) -> list[Row]:
        return [{**row, "lm_loss": row["lm_loss"] * 1.08} for row in rows]

    baselines = put_baseline(suite, launches, policy)
    log = write_synthetic_run(tmp_path / "bad", SyntheticRun(run_seed=9), change_rows=worse)
    junit = tmp_path / "junit.xml"
    options = ("-m", "cpu", "--from-logs", str(log), "--baseline-dir", str(baselines))
    done = run_pytest(suite, *options, "--junitxml", str(junit))
    assert done.returncode == 10
    assert "REGRESSION: convergence/synthetic@cpu" in done.stdout
    assert "Traceback" not in done.stdout
    assert [node.get("failures") for node in ET.parse(junit).getroot().iter("testsuite")] == ["1"]


@pytest.mark.parametrize(
    ("options", "ci", "code", "outcome"),
    [
        ((), True, 13, "FAILED"),
        pytest.param((), False, 13, "XFAIL", marks=pytest.mark.slow),
        pytest.param(("--missing-baseline", "skip"), False, 0, "SKIPPED", marks=pytest.mark.slow),
        pytest.param(("--missing-baseline", "skip"), True, 13, "FAILED", marks=pytest.mark.slow),
    ],
)
def test_missing_baseline_is_never_silent(
    options: tuple[str, ...],
    ci: bool,
    code: int,
    outcome: str,
    suite: Path,
    launches: list[RunRecord],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "none"
    where = ("-m", "cpu", "--from-logs", launches[0].source, "--baseline-dir", str(directory))
    done = run_pytest(suite, *where, *options, ci=ci)
    assert done.returncode == code, done.stdout
    assert outcome in done.stdout
    # the local default keeps the run as a candidate, which is not in force
    assert (directory / "candidates").exists() == (not options and not ci)


def test_plan_prints_and_stops(suite: Path) -> None:
    done = run_pytest(suite, "--plan")
    assert done.returncode == 0
    assert "convergence/synthetic@h20" in done.stdout
    assert "no, needs NVIDIA H20" in done.stdout
    assert "dataset 'scenes'" in done.stdout


def test_malformed_recipe_is_a_collection_error_without_traceback(suite: Path) -> None:
    recipe = suite / "synthetic.toml"
    recipe.write_text(recipe.read_text().replace("lr = ", "learning_rate = "))
    done = run_pytest(suite, "-m", "cpu")
    assert done.returncode == 2
    assert "unknown key 'optimizer.learning_rate'" in done.stdout
    assert "Traceback" not in done.stdout


def test_plugin_leaves_other_sessions_alone(tmp_path: Path) -> None:
    folder = tmp_path / "suites" / "plain"
    folder.mkdir(parents=True)
    (folder / "test_plain.py").write_text(
        "import pytest, sys\n"
        "@pytest.mark.parametrize('case', [1, 2])\n"
        "def test_own_case(case):\n    assert case\n"
        "def test_nothing_heavy_is_loaded():\n"
        "    assert not {'pandas', 'torch', 'jinja2', 'matplotlib'} & set(sys.modules)\n"
    )
    done = run_pytest(folder)
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "report").exists()
