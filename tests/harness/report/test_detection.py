# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest

from harness.report.build import JSON_FILE, build_report
from models.contract.errors import RunError
from suites.detection.run import _report


def row(name: str, *, caught: bool, gates: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name, "area": "model", "what": f"what {name} is", "setup": "qwen3_vl", "expected_gates": ["C1", "C2"],
        "caught": caught, "verdict": "REGRESSION" if caught else "PASS", "gates": gates,
        "red_gates": sorted(gate for gate, status in gates.items() if status == "fail"), "summary": "C1 said so",
    }  # fmt: skip


def pair(verdict: str) -> dict[str, Any]:
    return {
        "run": "a",
        "reference": "b",
        "verdict": verdict,
        "gates": {"C0": "pass", "C1": "pass"},
        "first_steps": "",
    }


CAUGHT = row("rope", caught=True, gates={"C0": "pass", "C1": "fail", "C2": "warn"})
MISSED = row("mask", caught=False, gates={"C0": "pass", "C1": "pass", "C2": "not_run"})


def written(folder: Path, rows: list[dict[str, Any]], trained: list[str], synthetic: list[str]) -> Path:
    data = _report(rows, list(map(pair, trained)), list(map(pair, synthetic)), num_runs=3)
    (folder / "detection.json").write_text(json.dumps(data))
    return folder / "detection.json"


def test_summary_counts_real_and_made_up_pairs_apart(tmp_path: Path) -> None:
    file = written(
        tmp_path, [CAUGHT, MISSED], ["PASS", "PASS_IMPROVED", "INCONCLUSIVE"], ["PASS", "REGRESSION"]
    )
    data = json.loads(file.read_text())
    assert data["summary"] == {
        "faults": 2, "caught": 1, "healthy_pairs": 3, "false_alarms": 1, "healthy_runs": 3, "synthetic_pairs": 2,
        "synthetic_false_alarms": 1,
    }  # fmt: skip
    assert data["healthy_gates"]["trained"] == {"C0": {"pass": 3}, "C1": {"pass": 3}}
    low, high = data["false_alarm"]["trained"]["interval"]
    assert low == pytest.approx(0.0084, abs=1e-4)  # Clopper and Pearson, 1 of 3
    assert high == pytest.approx(0.9057, abs=1e-4)


def test_report_shows_the_matrix(tmp_path: Path) -> None:
    file = build_report([written(tmp_path, [CAUGHT], ["PASS"] * 4, ["PASS"])], tmp_path / "out")
    html, markdown = file.read_text(), (tmp_path / "out" / "report.md").read_text()
    assert '<td class="cell bad expected" title="rope · C1: fail">●</td>' in html
    assert '<td class="cell warn expected" title="rope · C2: warn">◐</td>' in html
    assert '<td class="cell " title="rope · C0: pass">·</td>' in html
    assert "**1 / 1**, 100.0% [2.5%, 100.0%]" in markdown
    assert "**0 / 4**, 0.0% [0.0%, 60.2%]" in markdown
    assert "| model/rope | what rope is | C1 | REGRESSION |" in markdown
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text())["overall"] == "PASSED"
    assert "检出" in (tmp_path / "out" / "report.zh-CN.html").read_text()


@pytest.mark.parametrize(
    ("rows", "trained", "synthetic"),
    [
        ([CAUGHT, MISSED], ["PASS"], ["PASS"]),
        ([CAUGHT], ["INVALID"], ["PASS"]),
        ([CAUGHT], ["PASS"], ["INVALID"]),
    ],
    ids=["missed", "false_alarm", "synthetic_false_alarm"],
)
def test_report_fails_when_something_was_missed(
    rows: list[dict[str, Any]], trained: list[str], synthetic: list[str], tmp_path: Path
) -> None:
    build_report([written(tmp_path, rows, trained, synthetic)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text())["overall"] == "FAILED"
    assert ("**MISSED**" in (tmp_path / "out" / "report.md").read_text()) == (len(rows) > 1)


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1}', "[]", '{"schema_version": 2}'])
def test_foreign_detection_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "detection.json").write_text(text)
    with pytest.raises(RunError, match=r"detection\.json"):
        build_report([tmp_path], tmp_path / "out")
