# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were damaged, moved or set back: what is wrong is said, and nothing on disk changes by it."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from models.contract.errors import ConfigError, HarnessError, RunError
from models.contract.recipe import Recipe, differences
from models.contract.record import METRICS_FILE, RUN_FILE, iter_metrics, read_run_info
from models.contract.site import Site
from models.training import checkpoint, megatron_engine
from models.training.checkpoint import (
    FILES_FILE,
    FOLDER,
    STATE_FILE,
    TRACKER_FILE,
    latest_checkpoint,
    training_identity,
)
from models.training.progress import TrainOptions
from models.training.start import train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
ENGINES = ["megatron", "fsdp2"]
NEWEST = "iter_0000004"
SAVES = {"save_interval": 2, "keep_last": 2}


@pytest.fixture(scope="module")
def trained(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four of six steps with checkpoints after two and four, one run an engine; to be copied."""
    return {engine: tmp_path_factory.mktemp("trained") / engine for engine in ENGINES}


@pytest.fixture
def stopped(
    trained: dict[str, Path], site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> Callable[[str], tuple[Recipe, Path]]:
    """A recipe and a run of it that stopped after its fourth step."""

    def copy(engine: str) -> tuple[Recipe, Path]:
        recipe = make_recipe(train={"engine": engine}, checkpoint=SAVES)
        if not trained[engine].exists():
            train(recipe, site, trained[engine], TrainOptions(stop_after=4))
        return recipe, shutil.copytree(trained[engine], tmp_path / "run")

    return copy


def resume(recipe: Recipe, site: Site, run: Path, **options: Any) -> str:
    return train(recipe, site, run, TrainOptions(is_resume=True, **options))


def refusal(recipe: Recipe, site: Site, run: Path) -> HarnessError:
    """What the resume says; what is on disk stays, but for the outcome."""
    before = contents(run)
    with pytest.raises(HarnessError) as caught:
        resume(recipe, site, run)
    assert contents(run) == before
    outcome = read_run_info(run).outcome
    assert outcome.status == "failed"
    assert caught.value.what in str(outcome.error)
    return caught.value


def contents(run: Path) -> dict[str, bytes]:
    files = [run / METRICS_FILE, *(file for file in (run / FOLDER).rglob("*") if file.is_file())]
    return {str(file): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "text",
    [b"abc", b"", b"\xff\xfe", "²".encode(), b"9" * 5000, b"-2", b"3"],
    ids=["word", "empty", "bytes", "superscript", "long", "negative", "absent"],
)
def test_a_tracker_file_that_names_no_checkpoint_is_refused(text: bytes, tmp_path: Path) -> None:
    tracker = tmp_path / FOLDER / TRACKER_FILE
    for iteration in (2, 4):
        folder = tmp_path / FOLDER / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / STATE_FILE).touch()
    tracker.write_bytes(text)
    with pytest.raises(RunError, match="the tracker file names no whole checkpoint") as caught:
        latest_checkpoint(tmp_path)
    assert caught.value.where == str(tracker)
    assert caught.value.expected == "one of the iterations 2, 4"
    assert len(caught.value.got) < 100


def test_a_resume_with_a_tracker_file_that_names_no_checkpoint_changes_nothing(
    stopped: Any, site: Site
) -> None:
    recipe, run = stopped("megatron")
    (run / FOLDER / TRACKER_FILE).write_text("5\n")
    assert refusal(recipe, site, run).got == "'5'"


def test_without_a_tracker_file_the_newest_checkpoint_counts(
    stopped: Any, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    # As after a kill between the checkpoint's name and the tracker file; starting again would throw away four steps.
    caplog.set_level(logging.INFO, logger=checkpoint.__name__)
    recipe, run = stopped("megatron")
    (run / FOLDER / TRACKER_FILE).unlink()
    shutil.copytree(run / FOLDER / NEWEST, run / FOLDER / f"{NEWEST}.copy")  # by hand: none of ours
    before = list(iter_metrics(run))
    assert resume(recipe, site, run, stop_after=5) == "interrupted"
    assert f"{TRACKER_FILE} is missing: going on from the newest checkpoint, 4" in caplog.text
    assert list(iter_metrics(run))[:4] == before  # times included: these steps were not taken again
    assert (run / FOLDER / TRACKER_FILE).read_text() == "5\n"
    assert (run / FOLDER / f"{NEWEST}.copy").is_dir()


def test_a_tracker_file_without_checkpoints_says_so(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / FOLDER / TRACKER_FILE).write_text("4\n")
    with pytest.raises(RunError, match="put the checkpoints back"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_that_lacks_a_file_is_refused_by_name(engine: str, stopped: Any, site: Site) -> None:
    recipe, run = stopped(engine)
    shard = next((run / FOLDER / NEWEST).glob("*.distcp"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1])
    error = refusal(recipe, site, run)
    assert error.what == "the checkpoint is not whole"
    assert error.got == f"{shard.name} has {len(kept) - 1} bytes, not {len(kept)}"
    shard.unlink()
    (run / FOLDER / NEWEST / "loader_00000.json").unlink()
    error = refusal(recipe, site, run)
    assert error.got == f"{shard.name} is missing; loader_00000.json is missing"
    assert error.where == str(run / FOLDER / NEWEST)
    assert f"write 2 into {TRACKER_FILE}" in error.fix
    (run / FOLDER / TRACKER_FILE).write_text("2\n")  # as the message says
    assert resume(recipe, site, run, stop_after=3) == "interrupted"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("file", "text"),
    [
        pytest.param("*.distcp", None, id="shard"),
        pytest.param(".metadata", None, id="metadata"),
        pytest.param(STATE_FILE, "{", id="state"),
        pytest.param(STATE_FILE, "{}", id="state-empty"),
        pytest.param("loader_00000.json", "{}", id="loader"),
        pytest.param(FILES_FILE, "[]", id="files"),
    ],
)
def test_a_checkpoint_with_damaged_bytes_cannot_be_read(
    engine: str, file: str, text: str | None, stopped: Any, site: Site
) -> None:
    recipe, run = stopped(engine)
    folder = run / FOLDER / NEWEST
    damaged = next(folder.glob(file))
    damaged.write_bytes(text.encode() if text is not None else bytes(damaged.stat().st_size))
    if file == "loader_00000.json":
        (folder / FILES_FILE).unlink()  # as in a checkpoint of an earlier version
    error = refusal(recipe, site, run)
    assert error.what == "the checkpoint cannot be read"
    assert str(folder) in error.where
    assert error.got
    assert f"write 2 into {TRACKER_FILE}" in error.fix


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        (
            {"train": {"global_batch_size": 8}},
            "train.global_batch_size: 4 in the checkpoint, 8 in the recipe",
        ),
        ({"train": {"seed": 7}}, "train.seed: 1234 in the checkpoint, 7 in the recipe"),
        ({"train": {"engine": "fsdp2"}}, "train.engine: 'megatron' in the checkpoint, 'fsdp2' in the recipe"),
        ({"data": {"dataset": "others"}}, "data.dataset: 'scenes' in the checkpoint, 'others' in the recipe"),
    ],
    ids=["batch", "seed", "engine", "dataset"],
)
def test_a_checkpoint_of_another_recipe_is_refused_by_key(
    changes: dict[str, Any], got: str, stopped: Any, site: Site, make_recipe: MakeRecipe
) -> None:
    recipe, run = stopped("megatron")
    others = Path(site.datasets) / "others"
    if not others.exists():
        shutil.copytree(site.dataset("scenes"), others)
    error = refusal(make_recipe(checkpoint=SAVES, **changes), site, run)
    assert isinstance(error, ConfigError)
    assert error.what == "the checkpoint belongs to another recipe"
    assert error.got == got
    # what the run was is still there to be read
    assert read_run_info(run).recipe_sha == recipe.sha()
    assert resume(recipe, site, run, stop_after=5) == "interrupted"
    assert read_run_info(run).outcome.error is None


def test_a_resume_that_cannot_go_on_is_refused_before_the_model_is_built(
    stopped: Any, site: Site, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = stopped("megatron")

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("was built")

    monkeypatch.setattr("models.training.megatron_engine.start_engine", build)
    error = refusal(make_recipe(checkpoint=SAVES, train={"seed": 7}), site, run)
    assert error.what == "the checkpoint belongs to another recipe"


def test_limits_may_change_from_one_attempt_to_the_next(
    stopped: Any, site: Site, make_recipe: MakeRecipe
) -> None:
    _, run = stopped("megatron")
    state_file = run / FOLDER / NEWEST / STATE_FILE
    state = json.loads(state_file.read_text())
    state["identity"]["train"]["non_finite"] = "stop"  # as a checkpoint of an earlier version has it
    state_file.write_text(json.dumps(state))
    others = {"train": {"non_finite": "skip"}, "data": {"max_skipped_fraction": 0.5}}
    assert resume(make_recipe(checkpoint=SAVES, **others), site, run, stop_after=5) == "interrupted"


def test_checkpoint_of_other_experts_is_refused_and_one_before_there_was_a_choice_is_not(
    make_recipe: MakeRecipe,
) -> None:
    plain, grouped = (
        training_identity(make_recipe(model={"experts_backend": backend})) for backend in ("te", "grouped")
    )
    assert "experts_backend" not in plain["model"]
    [found] = differences(plain, grouped, "in the checkpoint", "in the recipe")
    assert found == "model.experts_backend: None in the checkpoint, 'grouped' in the recipe"


def test_a_dataset_that_was_made_again_is_refused(stopped: Any, site: Site, make_recipe: MakeRecipe) -> None:
    recipe, run = stopped("megatron")
    (run / FOLDER / TRACKER_FILE).write_text(
        "2\n"
    )  # two steps that the resume would take again stay on record
    stamp = site.dataset("scenes") / ".nv-meta" / "index.uuid"
    before = stamp.read_text()
    try:
        stamp.write_text("another")
        error = refusal(recipe, site, run)
    finally:
        stamp.write_text(before)
    assert error.what == "the loader state belongs to another run"
    assert error.expected == "dataset = another:train"


def test_optimizer_states_of_another_resharding_or_layout_are_refused(
    stopped: Any, site: Site, make_recipe: MakeRecipe
) -> None:
    recipe, run = stopped("megatron")
    data = make_recipe(checkpoint=SAVES | {"resharding": "data"})
    error = refusal(data, site, run)
    assert isinstance(error, ConfigError)
    assert error.what == "the checkpoint's optimizer states lie otherwise"
    assert (error.expected, error.got) == ("'any', as they were written", "'data' in the recipe")
    folder = run / FOLDER / NEWEST
    whole = checkpoint.read_state(folder, recipe)
    checkpoint.require_resharding(whole, recipe, whole.layout | {"tp": 2}, folder)
    state = dataclasses.replace(whole, resharding="data")
    for layout in (state.layout, state.layout | {"dp": 2}):
        checkpoint.require_resharding(state, data, layout, folder)
    with pytest.raises(ConfigError, match="for another layout") as caught:
        checkpoint.require_resharding(state, data, state.layout | {"dp": 2, "tp": 2, "pp": 4}, folder)
    assert (caught.value.expected, caught.value.got) == ("tp = 1, pp = 1", "tp = 2, pp = 4")


def test_optimizer_states_of_parameters_in_another_order_are_refused(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = make_recipe(checkpoint=SAVES | {"resharding": "data"}), tmp_path / "run"
    train(recipe, site, run, TrainOptions(stop_after=2))
    monkeypatch.setattr(megatron_engine, "parameter_order", lambda *_: "another")
    error = refusal(recipe, site, run)
    assert isinstance(error, ConfigError)
    assert error.what == "the checkpoint's optimizer states are of parameters in another order"
    assert str(error.expected).startswith("another, ")
    # as of an earlier version, which did not write it down
    load = dist_checkpointing.load_common_state_dict
    monkeypatch.setattr(
        megatron_engine.dist_checkpointing, "load_common_state_dict",
        lambda folder: {k: v for k, v in load(folder).items() if k != megatron_engine.PARAMETER_ORDER},
    )  # fmt: skip
    assert resume(recipe, site, run, stop_after=3) == "interrupted"


@pytest.mark.parametrize(
    ("engine", "is_async"),
    [
        pytest.param("megatron", False, marks=pytest.mark.slow),
        pytest.param("megatron", True, marks=pytest.mark.slow),
        ("fsdp2", True),
    ],
)
def test_a_run_that_was_set_back_keeps_what_it_saves(
    engine: str, is_async: bool, stopped: Any, site: Site, make_recipe: MakeRecipe, rows_of: Rows
) -> None:
    _, run = stopped(engine)
    before = rows_of(run)
    (run / FOLDER / TRACKER_FILE).write_text("2\n")
    saves = SAVES | {"save_interval": 1, "keep_last": 1, "async_save": is_async}
    recipe = make_recipe(train={"engine": engine}, checkpoint=saves)
    assert resume(recipe, site, run, stop_after=3) == "interrupted"
    folders = {folder.name for folder in (run / FOLDER).iterdir() if folder.is_dir()}
    assert folders == {"iter_0000003", "iter_0000004"}  # the later one waits until the run reaches it
    assert (run / FOLDER / TRACKER_FILE).read_text() == "3\n"
    stamp = (run / FOLDER / NEWEST).stat().st_ino
    assert resume(recipe, site, run, stop_after=4) == "interrupted"
    assert [folder.name for folder in (run / FOLDER).iterdir() if folder.is_dir()] == [NEWEST]
    assert (run / FOLDER / NEWEST).stat().st_ino != stamp
    assert rows_of(run) == before


@pytest.mark.parametrize("option", ["trace", "profile"])
@pytest.mark.parametrize(("iteration", "stop_after"), [(4, None), (7, None), (6, 5)])
def test_an_iteration_to_record_that_is_not_taken_is_refused(
    option: str, iteration: int, stop_after: int | None, stopped: Any, site: Site
) -> None:
    recipe, run = stopped("megatron")
    with pytest.raises(ConfigError, match="the iteration to record is not taken") as caught:
        resume(recipe, site, run, stop_after=stop_after, **{option: iteration})
    error = caught.value
    assert (error.where, error.expected) == (f"--{option}", f"5 to {stop_after or 6}")
    assert error.got == str(iteration)


def test_metrics_that_cannot_be_read_are_named(stopped: Any, site: Site) -> None:
    recipe, run = stopped("megatron")
    lines = (run / METRICS_FILE).read_text().splitlines()
    (run / METRICS_FILE).write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    error = refusal(recipe, site, run)
    assert error.what == "metrics.jsonl cannot be read"
    assert error.where == f"{run / METRICS_FILE}, the line after iteration 1"


def test_metrics_that_are_missing_are_told(
    stopped: Any, site: Site, rows_of: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="models.training.progress")
    recipe, run = stopped("megatron")
    lines = (run / METRICS_FILE).read_text().splitlines()
    (run / METRICS_FILE).write_text("\n".join(lines[:2]) + "\n")
    assert resume(recipe, site, run, stop_after=5) == "interrupted"
    assert (
        f"{METRICS_FILE} lacks 2 of the 4 iterations before the checkpoint, iteration 3 first" in caplog.text
    )
    assert [row["iteration"] for row in rows_of(run)] == [1, 2, 5]


@pytest.mark.parametrize("engine", ["megatron", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_a_checkpoint_before_its_first_update(
    engine: str,
    site: Site,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    rows_of: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(
        train={"engine": engine, "train_iters": 3, "non_finite": "skip"}, checkpoint={"save_interval": 1}
    )
    with monkeypatch.context() as planted:  # as when a loss scale begins too high
        planted.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(float("inf")))
        train(recipe, site, tmp_path / "run", TrainOptions(stop_after=1))
    assert resume(recipe, site, tmp_path / "run") == "completed"
    assert [row["num_skipped_iterations"] for row in rows_of(tmp_path / "run")] == [1, 0, 0]


def test_a_completed_run_stays_so_whatever_it_is_resumed_with(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_recipe(checkpoint={"save_final": True}), site, run, TrainOptions())
    before = (run / RUN_FILE).read_text()
    with pytest.raises(ConfigError, match="another recipe"):
        resume(make_recipe(optimizer={"lr": 2e-3}), site, run)
    assert (run / RUN_FILE).read_text() == before


@pytest.mark.parametrize("name", [pytest.param(FILES_FILE, marks=pytest.mark.slow), TRACKER_FILE])
def test_a_checkpoint_that_cannot_be_published_ends_the_run_and_keeps_the_one_before(
    name: str, stopped: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = stopped("megatron")
    write = checkpoint.write_whole

    def full(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    error = refusal_of_publishing(recipe, site, run)
    assert error.what == "checkpoint could not be written"
    assert "No space left on device" in error.got
    assert "MB are free there" in error.got
    monkeypatch.undo()
    assert (run / FOLDER / TRACKER_FILE).read_text() == "4\n"
    assert resume(recipe, site, run) == "completed"


def refusal_of_publishing(recipe: Recipe, site: Site, run: Path) -> HarnessError:
    with pytest.raises(RunError) as caught:
        resume(recipe, site, run, stop_after=5)
    assert not list((run / FOLDER).glob("*.partial"))
    return caught.value
