# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, stopped, or go on elsewhere: nothing is lost, and every number comes out as without it."""

import json
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from models.contract.errors import ConfigError
from models.contract.recipe import Recipe
from models.contract.record import RUN_FILE, iter_metrics, read_run_info
from models.contract.site import Site
from models.training.checkpoint import FOLDER, STATE_FILE, TRACKER_FILE
from models.training.interruption import HANG_EXIT_CODE
from models.training.loader_resharding import loader_state_for
from models.training.progress import TrainOptions
from models.training.start import train
from tests.models.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
logger = logging.getLogger(__name__)
TRAIN_ITERS = 16
SAVE_INTERVAL = 2
KILLS_PER_LAYOUT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Of a run that is killed."""

    engine: str
    num_processes: int = 1
    is_async: bool = False
    parallel: dict[str, int] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
MOE = {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl_moe"}
LAYOUTS = {
    "megatron": Layout(engine="megatron"),
    "megatron-dp2": Layout(engine="megatron", num_processes=2),
    "megatron-tp2": Layout(engine="megatron", num_processes=2, parallel=TP2),
    "megatron-pp2-async": Layout(engine="megatron", num_processes=2, parallel=PP2, is_async=True),
    "megatron-moe-ep2": Layout(engine="megatron", num_processes=2, parallel=EP2, model=MOE),
    "megatron-cp2": Layout(engine="megatron", num_processes=2, parallel=CP2),
    "megatron-moe-ep2-cp2-async": Layout(
        engine="megatron", num_processes=4, parallel=EP2 | CP2, is_async=True, model=MOE
    ),
    "fsdp2": Layout(engine="fsdp2"),
    "fsdp2-dp2": Layout(engine="fsdp2", num_processes=2),
    "fsdp2-dp2-async": Layout(engine="fsdp2", num_processes=2, is_async=True),
}
"""Four kills each: 40 kill points."""


def last_row(run: Path, rows_of: Rows) -> int:
    return max((row["iteration"] for row in rows_of(run)), default=0)


def saved_iteration(run: Path) -> int:
    tracker = run / FOLDER / TRACKER_FILE
    return int(tracker.read_text()) if tracker.exists() else 0


def stamp(run: Path) -> str:
    """What tells one attempt of a run from the next."""
    return read_run_info(run).started_at if (run / RUN_FILE).exists() else ""


def has_saved(run: Path, before: str, saved_before: int) -> bool:
    """Whether a later attempt than the one stamped `before` has finished a save."""
    return stamp(run) != before and saved_iteration(run) > saved_before


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_at_random_moments_change_no_number(
    layout: str,
    all_families: Site,
    trainer: Trainer,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    rows_of: Rows,
) -> None:
    chosen = LAYOUTS[layout]
    recipe = make_recipe(
        chosen.num_processes,
        model=chosen.model,
        train={"engine": chosen.engine, "train_iters": TRAIN_ITERS},
        parallel=chosen.parallel,
        checkpoint={
            "save_interval": SAVE_INTERVAL,
            "keep_last": 2,
            "save_final": True,
            "resharding": "data",
            "async_save": chosen.is_async,
        },
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut-0"
    duration = trainer.run(recipe, whole)
    training = sum(row["step_time_ms"] for row in iter_metrics(whole)) / 1000
    moments = random.Random(layout)
    kills = num_after_a_save = 0
    while kills < KILLS_PER_LAYOUT:
        before, saved_before = stamp(cut), saved_iteration(cut)
        pids = trainer.start(recipe, cut, "--resume")
        if (
            kills % 2
        ):  # while steps are taken and saved: the first save of this attempt is finished, more are to come
            has_ended = trainer.has_ended_before(partial(has_saved, cut, before, saved_before))
            wait_s = moments.uniform(0.0, 0.6) * training * (1 - saved_iteration(cut) / TRAIN_ITERS)
        else:  # anywhere, the start and the loading included
            has_ended = False
            wait_s = moments.uniform(0.05, 0.45) * duration
        if has_ended or trainer.has_ended_within(wait_s):  # between kills it came to its end
            assert set(trainer.wait()) == {0}
            assert_same_run(cut, whole, rows_of)
            cut = tmp_path / f"cut-{kills}-{time.monotonic_ns()}"
            continue
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert set(trainer.wait()) == {-signal.SIGKILL}
        kills += 1
        num_after_a_save += saved_iteration(cut) > 0
        logger.info(
            "%s: kill %d after iteration %d, %d saved",
            layout,
            kills,
            last_row(cut, rows_of),
            saved_iteration(cut),
        )
        # the run had at most one save interval, and the step in hand, that are not saved; a save that is still being
        # written in the background counts as none
        num_unsaved = 2 * SAVE_INTERVAL if chosen.is_async else SAVE_INTERVAL
        assert last_row(cut, rows_of) <= saved_iteration(cut) + num_unsaved
    assert num_after_a_save >= KILLS_PER_LAYOUT / 2  # resumes from a checkpoint, not only from the start
    trainer.run(recipe, cut, "--resume")
    assert_same_run(cut, whole, rows_of)


def assert_same_run(cut: Path, whole: Path, rows_of: Rows) -> None:
    assert rows_of(cut) == rows_of(whole)
    ours, theirs = read_run_info(cut), read_run_info(whole)
    assert ours.data_order_digest == theirs.data_order_digest
    assert ours.outcome == theirs.outcome


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "fsdp2"])
def test_sigterm_saves_and_the_run_goes_on(
    engine: str, trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(2, train={"engine": engine, "train_iters": 8}, checkpoint={"save_interval": 100})
    duration = trainer.run(recipe, tmp_path / "whole")
    pids = trainer.start(recipe, tmp_path / "cut")
    while last_row(tmp_path / "cut", rows_of) < 2:
        assert not trainer.has_ended_within(duration / 100)
    os.kill(pids[1], signal.SIGTERM)  # one rank hears it, all of them leave after the same step
    assert trainer.wait() == [0, 0]
    outcome = read_run_info(tmp_path / "cut").outcome
    assert outcome.status == "interrupted"
    assert saved_iteration(tmp_path / "cut") == outcome.iteration == last_row(tmp_path / "cut", rows_of)
    trainer.run(recipe, tmp_path / "cut", "--resume")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


ONE: dict[str, int] = {}
MOVES: dict[str, tuple[str, tuple[int, dict[str, int]], tuple[int, dict[str, int]], dict[str, Any]]] = {
    "megatron-dp1-dp2": ("megatron", (1, ONE), (2, ONE), {}),
    "megatron-dp2-dp1": ("megatron", (2, ONE), (1, ONE), {}),
    "megatron-tp2-pp2": ("megatron", (2, TP2), (2, PP2), {}),
    "megatron-tp2-one": ("megatron", (2, TP2), (1, ONE), {}),
    "megatron-one-cp2": ("megatron", (1, ONE), (2, CP2), {}),
    "megatron-cp2-tp2": ("megatron", (2, CP2), (2, TP2), {}),
    "megatron-vpp2-pp2": (
        "megatron", (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}), (2, PP2), {}
    ),
    "megatron-frozen-pp2-one": ("megatron", (2, PP2), (1, ONE), {"freeze": ["language"]}),
    "megatron-moe-pp2-ep2": ("megatron", (2, PP2), (2, EP2), MOE),
    "megatron-moe-ep2-cp2-one": ("megatron", (2, EP2 | CP2), (1, ONE), MOE),
    "megatron-moe-frozen-one-ep2": ("megatron", (1, ONE), (2, EP2), MOE | {"freeze": ["language"]}),
    "fsdp2-dp1-dp2": ("fsdp2", (1, ONE), (2, ONE), {}),
    "fsdp2-dp2-dp1": ("fsdp2", (2, ONE), (1, ONE), {}),
}  # fmt: skip
"""Engine, layout before, layout after, what is trained."""


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_resume_at_another_layout_sees_the_same_samples(
    move: str,
    all_families: Site,
    trainer: Trainer,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    rows_of: Rows,
) -> None:
    engine, before, after, model = MOVES[move]

    def recipe_at(layout: tuple[int, dict[str, int]]) -> Recipe:
        processes, parallel = layout
        return make_recipe(
            processes,
            model=model,
            train={"engine": engine, "train_iters": 8},
            data={"padding": "max_length"},
            parallel=parallel,
            checkpoint={"save_interval": 4, "resharding": "any"},
        )

    trainer.run(recipe_at(before), tmp_path / "whole")
    trainer.run(recipe_at(before), tmp_path / "moved", "--stop-after", "4")
    trainer.run(recipe_at(after), tmp_path / "moved", "--resume")
    # The layout adds in another order: measured worst over four steps and all cases 4e-7 in loss, 2e-6 in norm.
    for a, b in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "moved"), strict=True):
        assert b["sample_digest"] == a["sample_digest"]
        assert b["learning_rate"] == a["learning_rate"]
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=5e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5)


@pytest.mark.slow
def test_a_hanging_rank_ends_the_run_with_the_stacks_of_all_ranks(
    trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    trainer.start(make_recipe(2), tmp_path / "run", "--step-timeout", "12", fault="hang")
    assert HANG_EXIT_CODE in trainer.wait()
    stacks = [(tmp_path / "run" / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "stuck_update" in stacks[1]
    error = read_run_info(tmp_path / "run").outcome.error
    assert error is not None
    assert "no progress for" in error


@pytest.mark.slow
def test_the_rank_that_failed_is_named_first(
    trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    trainer.start(make_recipe(2), tmp_path / "run", fault="fail")
    assert 0 not in trainer.wait()
    outcome = read_run_info(tmp_path / "run").outcome
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("rank 1: ")
    assert "planted on rank 1" in outcome.error


@pytest.mark.slow
def test_overlapped_exchange_changes_no_number_and_no_saved_weight(
    trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    rows, weights = [], []
    for overlaps in (False, True):
        run = tmp_path / str(overlaps)
        recipe = make_recipe(
            2,
            train={"train_iters": 4, "eval_interval": 2, "eval_samples": 4},
            parallel={"overlap_grad_reduce": overlaps, "overlap_param_gather": overlaps},
            checkpoint={"save_interval": 3},  # an evaluation brings the weights up to date
        )
        trainer.run(recipe, run)
        rows.append(rows_of(run))
        weights.append(saved_weights(run / FOLDER / "iter_0000003"))
    assert rows[0] == rows[1]
    assert sum(row.get("eval_lm_loss") is not None for row in rows[1]) == 2
    torch.testing.assert_close(weights[1], weights[0], atol=0, rtol=0)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def test_run_starts_from_a_converted_checkpoint(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    from models.conversion.convert import Options, hf_to_megatron

    source = site.checkpoint("tiny-qwen2_5_vl")
    converted = tmp_path / "converted"
    hf_to_megatron(source, converted, Options())
    for name, checkpoint in (("hf", str(source)), ("megatron", str(converted))):
        train(
            make_recipe(model={"checkpoint": checkpoint}), site, tmp_path / name, TrainOptions(stop_after=2)
        )
    assert rows_of(tmp_path / "megatron") == rows_of(tmp_path / "hf")
    recipe = make_recipe(model={"checkpoint": str(converted)}, train={"engine": "fsdp2"})
    with pytest.raises(ConfigError, match="starts from Hugging Face weights"):
        train(recipe, site, tmp_path / "fsdp2", TrainOptions(stop_after=2))


def test_checkpoint_without_weights_is_refused(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in site.checkpoint("tiny-qwen2_5_vl").iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="holds no weights"):
        train(make_recipe(model={"checkpoint": str(bare)}), site, tmp_path / "run", TrainOptions())


def loader_states(ranks: int, *, turn: int = 0, **layout: Any) -> list[dict[str, Any]]:
    base = {"packing": False, "num_workers": 0, "micro_batch_size": 2, "seed": 1, "data_parallel_size": ranks}
    return [
        {
            "version": 1, "layout": base | {"data_parallel_rank": rank} | layout, "num_read": 3, "num_skipped": 1,
            "skipped": [{"key": str(rank)}], "reasons": {"broken": 1},
            "source": {"turn": turn, "loaders": [f"s{rank}{stream}" for stream in range(8 // ranks)]},
        }
        for rank in range(ranks)
    ]  # fmt: skip


def test_loader_state_hands_streams_over_in_order() -> None:
    states = loader_states(2)
    moved = [loader_state_for(states, rank, 4, micro_batch_size=1, where="x") for rank in range(4)]
    assert [stream for state in moved for stream in state["source"]["loaders"]] == [
        "s00", "s01", "s02", "s03", "s10", "s11", "s12", "s13",
    ]  # fmt: skip
    assert [state["layout"]["data_parallel_rank"] for state in moved] == [0, 1, 2, 3]
    assert {state["layout"]["data_parallel_size"] for state in moved} == {4}
    assert {state["layout"]["micro_batch_size"] for state in moved} == {1}
    assert sum(state["num_skipped"] for state in moved) == 2
    assert moved[0]["reasons"] == {"broken": 2}


@pytest.mark.parametrize(
    ("states", "ranks", "reason"),
    [
        (loader_states(2, turn=3), 1, "a rank skipped a sample"),
        (loader_states(2, packing=True), 1, "data.packing"),
        (loader_states(2, num_workers=4), 1, "data.num_workers"),
        (loader_states(2), 3, "8 streams do not divide over 3 ranks"),
    ],
)
def test_loader_state_refuses_what_would_change_the_order(
    states: list[dict[str, Any]], ranks: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match="would change the order") as caught:
        loader_state_for(states, 0, ranks, micro_batch_size=2, where="x")
    assert reason in str(caught.value)


def test_checkpoint_state_names_the_layout(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(checkpoint={"save_interval": 2}), site, tmp_path / "run", TrainOptions(stop_after=2))
    state = json.loads((tmp_path / "run" / FOLDER / "iter_0000002" / STATE_FILE).read_text())
    assert state["layout"]["dp"] == 1
    assert len(state["sample_digests"]) == 2
