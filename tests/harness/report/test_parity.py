# SPDX-License-Identifier: Apache-2.0
"""The parity matrix in the report: every cell in both formats, a bad one decides the verdict."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.cli import judge
from harness.report.build import build_report
from harness.report.parity import parity_view
from harness.report.strings import LANGUAGES, texts
from models.contract.errors import RunError


def cell(modality: str, layout: str, count: int, **values: Any) -> dict[str, Any]:
    numbers = {"logits": 1.5e-6, "loss": 2.5e-8, "gradient_norm": 3.5e-8, "gradient": 4.5e-6}
    place = {"model": "tiny", "modality": modality, "layout": layout, "num_processes": count}
    return place | numbers | {"worst": "some.weight", "missing": [], "agrees": True} | values


def document(*cells: dict[str, Any]) -> dict[str, Any]:
    limits = {"logits": 1e-4, "loss": 1e-5, "gradient_norm": 1e-4, "gradient": 1e-3}
    return {
        "schema_version": 1,
        "oracle": "transformers 5",
        "dtype": "fp32",
        "limits": limits,
        "cells": [*cells],
    }


GOOD = document(
    cell("packed", "cp2", 2), cell("video", "cp2", 2), cell("text", "one", 1), cell("text", "cp2", 2)
)
BAD = document(cell("text", "one", 1), cell("video", "cp2", 2, logits=0.25, agrees=False))


def write(folder: Path, data: dict[str, Any]) -> Path:
    file = folder / "parity.json"
    file.write_text(json.dumps(data))
    return file


def test_rows_are_layouts_by_processes_and_columns_modalities() -> None:
    [table] = parity_view([GOOD], texts("en"))
    assert table["modalities"] == ["text", "video", "packed"]
    assert [(row["processes"], row["layout"]) for row in table["rows"]] == [(1, "one"), (2, "cp2")]
    assert table["rows"][0]["cells"][1]["lines"] == ["–"]  # was not measured
    assert table["rows"][1]["cells"][1]["lines"] == ["1.5e-06", "2.5e-08", "3.5e-08"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_worst_of_each_measure_is_named(language: Any) -> None:
    [table] = parity_view([BAD], texts(language))
    assert table["tone"] == "bad"
    assert table["worst"][0][1:] == ("2.5e-01 / 1e-04", "video, 2 × cp2")


def test_report_of_a_matrix_alone_shows_every_cell(tmp_path: Path) -> None:
    build_report([write(tmp_path, GOOD)], tmp_path / "out")
    for name in ("report.html", "report.zh-CN.html", "report.md", "report.zh-CN.md"):
        assert (tmp_path / "out" / name).read_text().count("3.5e-08") >= 4
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overall"] == "PASSED"


def test_cell_that_differs_fails_the_report_and_is_named(tmp_path: Path) -> None:
    write(tmp_path, BAD)
    build_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "FAILED" in text
    assert "tiny, video, 2 × cp2: some.weight" in text
    assert "**2.5e-01 · 2.5e-08 · 3.5e-08**" in text


@pytest.mark.parametrize("data", [{"cells": []}, document(), {"schema_version": 2}, {"schema_version": 1}])
def test_another_files_content_is_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="not a parity matrix"):
        build_report([write(tmp_path, data)], tmp_path / "out")


def test_report_of_a_published_file_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.session.REPORTS", tmp_path)
    file = write(tmp_path, GOOD)
    assert judge.build([file], None, None) == tmp_path / "parity" / "report.html"
    assert json.loads(file.read_text()) == GOOD
