# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind when its numbers break, when it is told to stop, or when it cannot go on."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.contract.errors import ConfigError, DataError, RunError
from models.contract.recipe import Recipe
from models.contract.record import read_run_info
from models.contract.run_rules import check_run
from models.contract.site import Site
from models.training import metrics, run_file, start
from models.training.checkpoint import FOLDER, TRACKER_FILE
from models.training.optimizer import check_optimizer
from models.training.progress import TrainOptions
from models.training.start import train
from tests.models.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
ENGINES = ["megatron", pytest.param("fsdp2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def poisoned(site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint in which one word is not a number: only batches that hold it break."""
    folder = tmp_path_factory.mktemp("poisoned") / "tiny"
    shutil.copytree(site.checkpoint("tiny-qwen2_5_vl"), folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    name = "model.embed_tokens.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][vocabulary["Ġmoves"]] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    engine: str, poisoned: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(train={"engine": engine, "train_iters": 16}, model={"checkpoint": poisoned})
    with pytest.raises(RunError, match="loss or gradient is not finite") as caught:
        train(recipe, site, tmp_path / "run", TrainOptions())
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["lm_loss"] == "nan"  # the step that broke is on record
    assert rows[-1]["num_nan_iterations"] == 1
    assert all(isinstance(row["lm_loss"], float) for row in rows[:-1])
    [file] = (tmp_path / "run").glob("non_finite_*.json")
    facts = json.loads(file.read_text())
    assert facts["iteration"] == rows[-1]["iteration"]
    assert len(facts["sample_keys"]) == 4
    assert file.name in str(caught.value)
    outcome = read_run_info(tmp_path / "run").outcome
    assert (outcome.status, outcome.iteration) == ("failed", rows[-1]["iteration"])


@pytest.mark.slow
def test_a_run_that_stopped_at_a_loss_that_is_not_finite_goes_on_without_it_as_its_message_says(
    poisoned: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipes = [
        make_recipe(
            train={"train_iters": 13, "non_finite": policy}, model={"checkpoint": poisoned},
            checkpoint={"save_interval": 1, "keep_last": 1},
        )
        for policy in ("skip", "stop")
    ]  # fmt: skip
    train(recipes[0], site, tmp_path / "whole", TrainOptions())
    with pytest.raises(RunError, match="non_finite = 'skip' goes on"):
        train(recipes[1], site, tmp_path / "run", TrainOptions())
    assert train(recipes[0], site, tmp_path / "run", TrainOptions(is_resume=True)) == "completed"
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert any(row["num_nan_iterations"] for row in rows_of(tmp_path / "run"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_is_skipped_when_asked(
    engine: str, poisoned: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(
        train={"engine": engine, "train_iters": 16, "non_finite": "skip"}, model={"checkpoint": poisoned}
    )
    assert train(recipe, site, tmp_path / "run", TrainOptions()) == "completed"
    rows = rows_of(tmp_path / "run")
    broken = [row["iteration"] for row in rows if row["num_nan_iterations"]]
    assert 0 < len(broken) < 16
    assert broken == [row["iteration"] for row in rows if row["num_skipped_iterations"]]
    # the weights stayed finite: whatever does not hold the word still has a loss
    assert all(isinstance(row["lm_loss"], float) for row in rows if row["iteration"] not in broken)
    assert len(list((tmp_path / "run").glob("non_finite_*.json"))) == len(broken)


def test_stopping_early_saves_where_a_checkpoint_is_kept_at_all(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    kept = make_recipe(checkpoint={"save_final": True})  # no interval: the end alone would be saved
    assert train(kept, site, tmp_path / "kept", TrainOptions(stop_after=2)) == "interrupted"
    assert (tmp_path / "kept" / FOLDER / TRACKER_FILE).read_text() == "2\n"
    nothing = make_recipe(checkpoint={"save_final": False})
    assert train(nothing, site, tmp_path / "nothing", TrainOptions(stop_after=2)) == "interrupted"
    assert not (tmp_path / "nothing" / FOLDER).exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_without_optimizer_states_is_refused(
    engine: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(train={"engine": engine}, checkpoint={"save_interval": 2, "save_optimizer": False})
    train(recipe, site, tmp_path / "run", TrainOptions(stop_after=2))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds no optimizer state") as caught:
        train(recipe, site, tmp_path / "run", TrainOptions(is_resume=True))
    assert "save_optimizer" in str(caught.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before  # nothing was lost


@pytest.mark.parametrize("engine", ENGINES)
def test_offload_from_a_cpu_to_a_cpu_is_refused(
    engine: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(
        train={"engine": engine}, optimizer={"cpu_offload_fraction": 1.0}, precision={"dtype": "bf16"}
    )
    with pytest.raises(ConfigError, match="cpu_offload_fraction has no effect on a CPU"):
        train(recipe, site, tmp_path / "run", TrainOptions())


@pytest.mark.parametrize("changes", [{"use_distributed_optimizer": False}, {}])
def test_fsdp2_offloads_fp32_weights_on_a_gpu(changes: dict[str, Any], make_recipe: MakeRecipe) -> None:
    """It keeps whole parameters on the CPU, where megatron-core keeps the fp32 copies of 16-bit ones."""
    recipe = make_recipe(train={"engine": "fsdp2"}, optimizer=changes | {"cpu_offload_fraction": 1.0})
    assert check_run(recipe) == []
    check_optimizer(recipe, torch.device("cuda"))


def test_a_held_out_set_that_is_too_small_is_refused_before_the_first_step(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(train={"eval_interval": 2, "eval_samples": 64})
    with pytest.raises(DataError, match="held-out set is exhausted") as caught:
        train(recipe, site, tmp_path / "run", TrainOptions())
    assert "64 samples" in str(caught.value)
    assert "got:      16" in str(caught.value)
    assert rows_of(tmp_path / "run") == []


def test_a_held_out_set_that_ends_too_soon_is_refused(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "require_held_out", lambda *_: None)  # its samples may turn out to be unusable
    recipe = make_recipe(train={"eval_interval": 2, "eval_samples": 64})
    with pytest.raises(DataError, match="held-out set is exhausted") as caught:
        train(recipe, site, tmp_path / "run", TrainOptions())
    assert "got:      16" in str(caught.value)


@pytest.mark.slow
def test_a_held_out_set_that_ends_too_soon_on_one_rank_ends_all(
    all_families: Site, trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    # Of the 16 samples 8 are short enough, 3 of the first rank and 5 of the second: its fourth batch would wait for
    # the experts of the first, which is through.
    recipe = make_recipe(
        2,
        model={"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl_moe"},
        data={"seq_length": 56, "max_skipped_fraction": 1.0},
        train={"micro_batch_size": 1, "eval_interval": 1, "eval_samples": 8},
        parallel={"expert_model_parallel_size": 2},
    )
    trainer.start(recipe, tmp_path / "run", "--step-timeout", "60")
    assert set(trainer.wait()) == {1}
    outcome = read_run_info(tmp_path / "run").outcome
    assert outcome.error is not None
    assert "the held-out set is exhausted" in outcome.error
    assert "got:      6" in outcome.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [pytest.param("metrics.jsonl", id="metrics"), pytest.param("run.json", id="outcome")]
)
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_space(
    file: str,
    site: Site,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    rows_of: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, run = make_recipe(checkpoint={"save_interval": 2}), tmp_path / "run"
    train(recipe, site, tmp_path / "whole", TrainOptions())

    def full(*arguments: Any) -> None:
        if file == "run.json" or arguments[1].iteration == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(run / file))

    train(recipe, site, run, TrainOptions(stop_after=3))
    with monkeypatch.context() as patch:
        module, name = (start, "write_run_info") if file == "run.json" else (metrics, "append_metrics")
        patch.setattr(module, name, full)
        with pytest.raises(RunError, match="the run directory cannot be written") as caught:
            train(recipe, site, run, TrainOptions(is_resume=True))
    assert caught.value.where == str(run / file)
    assert caught.value.got.startswith("No space left on device; ")
    outcome = read_run_info(run).outcome
    assert outcome.status == "failed"
    assert "No space left on device" in str(outcome.error)
    assert train(recipe, site, run, TrainOptions(is_resume=True)) == "completed"
    assert rows_of(run) == rows_of(tmp_path / "whole")


def test_a_disk_that_is_full_everywhere_hides_no_error(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        monkeypatch.setattr(start, "write_run_info", full)
        monkeypatch.setattr(run_file, "write_run_info", full)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "append_metrics", full)
    with pytest.raises(RunError, match="the run directory cannot be written"):
        train(make_recipe(), site, tmp_path / "run", TrainOptions())
    assert read_run_info(tmp_path / "run").outcome.phase == "training"
