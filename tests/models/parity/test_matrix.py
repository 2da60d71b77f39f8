# SPDX-License-Identifier: Apache-2.0
"""The whole parity matrix, and what its file holds. ``make slow`` runs the cells; `make test` only the bookkeeping."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.entry.parity import main
from models.parity.matrix import LAYOUTS, LIMITS, Cell, layouts_of, matrix_document, measure, modalities_of
from models.parity.oracles import TINY


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "model": "qwen3_vl", "modality": "text", "layout": "one", "num_processes": 1, "logits": 1e-7, "loss": 1e-8,
        "gradient_norm": 1e-8, "gradient": 1e-6, "worst": "x", "num_gradients": 3, "missing": [],
    }  # fmt: skip
    return Cell(**(values | changes))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("num_processes", LAYOUTS)
@pytest.mark.parametrize("model", TINY)
def test_every_cell_agrees(model: str, num_processes: int, tmp_path: Path) -> None:
    cells = measure(model, num_processes, tmp_path)
    assert len(cells) == len(layouts_of(model, num_processes)) * len(modalities_of(model))
    assert [found.to_dict() for found in cells if not found.agrees] == []


@pytest.mark.parametrize("measure", LIMITS)
def test_cell_at_its_limit_does_not_agree(measure: str) -> None:
    assert cell().agrees
    assert not cell(**{measure: LIMITS[measure]}).agrees
    assert not cell(missing=["a.weight"]).agrees


def test_every_model_runs_every_kind_of_parallelism() -> None:
    for model in TINY:
        changes = [change for count in LAYOUTS for change in layouts_of(model, count).values()]
        keys = {key for change in changes for key in change}
        wanted = {"tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "num_dp",
                  "virtual_pipeline_model_parallel_size", "context_parallel_size", "recompute"}  # fmt: skip
        if "num_experts" in TINY[model].config["text_config"]:
            wanted |= {"expert_model_parallel_size", "expert_tensor_parallel_size"}
        assert wanted <= keys


def test_new_cells_take_the_place_of_earlier_ones() -> None:
    earlier = matrix_document([cell(loss=0.5), cell(modality="video")])
    merged = matrix_document([cell(loss=1e-9)], json.loads(json.dumps(earlier)))
    assert [(row["modality"], row["loss"], row["agrees"]) for row in merged["cells"]] == [
        ("text", 1e-9, True),
        ("video", 1e-8, True),
    ]


def test_unknown_model_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["parity", "-o", str(tmp_path / "p.json"), "--model", "qwen9"])
    assert main() == 3
    assert "qwen9" in capsys.readouterr().err
