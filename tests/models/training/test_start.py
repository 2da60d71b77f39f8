# SPDX-License-Identifier: Apache-2.0
"""Whole runs in one process: what they leave behind, how they end, and how they go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.contract.errors import ConfigError, RunError
from models.contract.recipe import Recipe
from models.contract.record import read_run_info
from models.contract.site import Site
from models.training.checkpoint import FOLDER, TRACKER_FILE
from models.training.progress import TrainOptions
from models.training.start import train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
PLAIN = TrainOptions()
RESUME = TrainOptions(is_resume=True)


def test_train_leaves_a_complete_run_directory(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(train={"train_iters": 4, "eval_interval": 2, "eval_samples": 4})
    assert train(recipe, site, tmp_path / "run", PLAIN) == "completed"
    info = read_run_info(tmp_path / "run")
    assert (info.outcome.status, info.outcome.iteration, info.outcome.error) == ("completed", 4, None)
    assert info.recipe_sha == recipe.sha()
    assert info.num_parameters["total"] == info.num_parameters["trainable"] > info.num_parameters["vision"] > 0
    assert info.sample_counts == {"consumed": 16, "skipped": 0}
    assert "cuda_device_literals" in info.environment["patches"]
    rows = rows_of(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert [row["eval_lm_loss"] is not None for row in rows] == [False, True, False, True]
    assert all(row["num_supervised_tokens"] < row["num_real_tokens"] <= row["num_padded_tokens"] for row in rows)
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert len(log) == 4
    assert " iteration        4/       4 | consumed samples:           16 | " in log[-1]


def test_train_refuses_a_directory_that_holds_a_run(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"train_iters": 1}, optimizer={"lr_warmup_iters": 0})
    train(recipe, site, tmp_path / "run", PLAIN)
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(recipe, site, tmp_path / "run", PLAIN)
    assert (tmp_path / "run" / "run.json").read_text() == before


@pytest.mark.parametrize("sharding", ["data", "any"])
def test_resume_repeats_the_uninterrupted_run_to_the_bit(
    sharding: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(checkpoint={"save_interval": 2, "resharding": sharding, "keep_last": 1})
    train(recipe, site, tmp_path / "whole", PLAIN)
    assert train(recipe, site, tmp_path / "cut", TrainOptions(stop_after=3)) == "interrupted"
    assert train(recipe, site, tmp_path / "cut", RESUME) == "completed"
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    whole, cut = read_run_info(tmp_path / "whole"), read_run_info(tmp_path / "cut")
    assert cut.data_order_digest == whole.data_order_digest


def test_resume_forgets_rows_after_the_checkpoint_and_checks_that_they_come_again(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(checkpoint={"save_interval": 2})
    run = tmp_path / "run"
    train(recipe, site, run, TrainOptions(stop_after=4))
    (run / FOLDER / TRACKER_FILE).write_text("2\n")  # as if killed before the second checkpoint was published
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    altered = json.loads(lines[3]) | {"sample_digest": "0" * 16}
    metrics.write_text("\n".join([*lines[:3], json.dumps(altered)]) + "\n")
    with pytest.raises(RunError, match="sees other samples") as caught:
        train(recipe, site, run, RESUME)
    assert "iteration 4" in str(caught.value)
    assert [row["iteration"] for row in rows_of(run)] == [1, 2, 3]


def test_resume_refuses_a_checkpoint_of_another_recipe(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    train(make_recipe(checkpoint={"save_interval": 2}), site, tmp_path / "run", TrainOptions(stop_after=2))
    with pytest.raises(ConfigError, match="another recipe") as caught:
        train(make_recipe(optimizer={"lr": 2e-3}), site, tmp_path / "run", RESUME)
    assert "optimizer.lr: 0.001 in the checkpoint, 0.002 in the recipe" in str(caught.value)
    assert read_run_info(tmp_path / "run").outcome.status == "failed"


def test_failure_is_written_to_run_json(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint folder not found"):
        train(make_recipe(model={"checkpoint": "absent"}), site, tmp_path / "run", PLAIN)
    outcome = read_run_info(tmp_path / "run").outcome
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("rank 0: ConfigError: checkpoint folder not found")


def test_wrong_number_of_processes_is_refused(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wrong number of processes"):
        train(make_recipe(num_processes=2), site, tmp_path / "run", PLAIN)
