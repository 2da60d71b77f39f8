# SPDX-License-Identifier: Apache-2.0
"""`diverge` on runs that recorded their tensors, and on recipes that it trains itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.cli import HARNESS_ERROR_EXIT, main
from harness.diverge import diverge, open_side
from models.contract.divergence import TraceHeader, trace_file
from models.contract.errors import ConfigError, RunError
from models.contract.record import (
    METRICS_FILE,
    RUN_FILE,
    RunInfo,
    StepMetrics,
    append_metrics,
    read_run_info,
    write_run_info,
)
from suites.detection.synthetic import SyntheticRun, recipe_of

HEADER = TraceHeader(
    iteration=2, engine="megatron", dp_rank=0, tp_rank=0, tp_size=1, cp_rank=0, is_sequence_first=False,
    is_sequence_parallel=False, columns=[0, 1], row_length=2, sample_keys=["x"], sample_lengths=[2],
    sample_places=[(0, 0)], vision_counts=[0], audio_counts=[0],
)  # fmt: skip


def write_run(
    folder: Path, *, loss: float = 2.0, digest: str = "d", mlp: float = 1.0, width: int = 3
) -> Path:
    """Three steps; loss and a recorded tensor of the second can be changed."""
    recipe = recipe_of(SyntheticRun())
    folder.mkdir(parents=True)
    info = RunInfo(
        run_id="r", recipe=json.loads(recipe.model_dump_json()), recipe_sha=recipe.sha(), family=recipe.model.family,
        command=[], started_at="2026-01-01T00:00:00+00:00", world_size=1,
    )  # fmt: skip
    write_run_info(folder, info)
    for iteration in (1, 2, 3):
        row = StepMetrics(
            iteration=iteration, consumed_train_samples=iteration, grad_norm=1.0,
            lm_loss=loss if iteration == 2 else 2.0,
            learning_rate=1e-3, global_batch_size=1, step_time_ms=1.0, num_padded_tokens=1, num_real_tokens=1,
            num_supervised_tokens=1, sample_digest=digest if iteration == 2 else "d",
        )  # fmt: skip
        append_metrics(folder, row)
    layer = "language_model.decoder.layers.1"
    tensors = {
        f"forward|{layer}": np.ones((1, 2, width), np.float32),
        f"backward|{layer}": np.ones((1, 2, width), np.float32),
    }
    tensors[f"forward|{layer}.mlp"] = np.full((1, 2, width), mlp, np.float32)
    for iteration in (1, 2):
        path = trace_file(folder, iteration, 0)
        path.parent.mkdir(parents=True)
        save_file(tensors, path, metadata={"header": HEADER.model_dump_json()})
    return folder


def test_diverge_names_step_and_tensor(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", loss=2.5, mlp=1.25)
    found = diverge(a, b, tmp_path / "work", steps=3)
    assert found.step is not None
    assert (found.step.iteration, found.step.field, found.recorded) == (2, "lm_loss", 2)
    assert found.forward is not None
    assert (found.forward.point, found.forward.relative) == ("language_model.decoder.layers.1.mlp", 0.25)
    assert found.backward is None
    text = "\n".join(found.lines())
    assert "first at iteration 2: lm_loss is 2.0 and 2.5" in text
    assert "forward:  first at language_model.decoder.layers.1.mlp: 2.5e-01 apart" in text
    assert "backward: equal" in text


def test_diverge_names_the_recipe_keys_that_differ(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    found = diverge(a, b, tmp_path / "work", steps=3)
    assert not found.parts
    assert found.lines()[0] == "recipes: equal"
    change(b, lambda recipe: recipe["train"].update(engine="fsdp2", log_interval=7))
    found = diverge(a, b, tmp_path / "work", steps=3)
    assert not found.parts  # a difference of recipes is none of the runs
    assert found.lines()[0] == "recipes: train.engine: 'megatron' in A, 'fsdp2' in B"


def test_diverge_of_a_run_with_itself_finds_nothing(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    found = diverge(a, a, tmp_path / "work", steps=3)
    assert not found.parts
    assert {point.relative for point in found.points} == {0.0}


def test_diverge_of_two_shapes_says_so(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", width=4)
    found = diverge(a, b, tmp_path / "work", steps=3)
    assert found.parts
    assert "forward:  first at language_model.decoder.layers.1: shapes apart" in "\n".join(found.lines())


def test_diverge_refuses_two_families(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    ours = open_side(a).recipe.model.family
    change(b, lambda recipe: recipe["model"].update(family="qwen3_omni"))
    with pytest.raises(ConfigError, match="two model families") as caught:
        diverge(a, b, tmp_path / "work", steps=3)
    assert caught.value.got == f"{ours} and qwen3_omni"
    assert not (tmp_path / "work").exists()


def test_diverge_names_a_run_that_cannot_be_read(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    metrics, rows = b / METRICS_FILE, (b / METRICS_FILE).read_text().splitlines()
    for second, got in (
        ('{"iter', "Invalid control character"),
        ("[]", "list"),
        ('{"iteration": 2}', "no global_batch_size"),
    ):
        metrics.write_text("\n".join([rows[0], second, rows[2]]) + "\n")
        with pytest.raises(RunError, match=r"metrics.jsonl cannot be read") as caught:
            diverge(a, b, tmp_path / "work", steps=3)
        assert caught.value.where == f"{metrics}, the line after iteration 1"
        assert got in caught.value.got
    metrics.unlink()
    with pytest.raises(RunError, match="share no iteration") as caught:
        diverge(a, b, tmp_path / "work", steps=3)
    assert caught.value.got == "iterations 1 to 3 and no iteration"
    (b / RUN_FILE).write_text("{")
    with pytest.raises(RunError, match=r"run.json cannot be read") as caught:
        diverge(a, b, tmp_path / "work", steps=3)
    assert caught.value.where == str(b / RUN_FILE)
    assert "EOF" in caught.value.got


def change(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    info = read_run_info(run)
    edit(info.recipe)
    write_run_info(run, info)


def test_diverge_stops_at_data_that_differ(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", loss=2.5, digest="other")
    found = diverge(a, b, tmp_path / "work", steps=3)
    assert found.recorded is None
    assert "did different things from iteration 2 on: sample_digest" in "\n".join(found.lines())


def test_diverge_exit_code_says_whether_runs_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", loss=2.5, mlp=1.25)
    for other, code, text in ((a, 0, "forward:  equal"), (b, 10, "1.mlp")):
        with pytest.raises(SystemExit) as stop:
            main(["diverge", str(a), str(other), "--work", str(tmp_path / "work")])
        assert stop.value.code == code
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["diverge", str(a), str(tmp_path / "nowhere")])
    assert stop.value.code == HARNESS_ERROR_EXIT
    assert "neither a run directory nor a recipe" in capsys.readouterr().err


def test_open_side_reads_the_recipe_of_a_run(tmp_path: Path) -> None:
    assert open_side(write_run(tmp_path / "a")).recipe == recipe_of(SyntheticRun())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        diverge(tmp_path / "a", tmp_path / "a", tmp_path / "full", steps=1)
