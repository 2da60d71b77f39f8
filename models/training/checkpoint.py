# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written beside, renamed when whole, named by a tracker file.

    checkpoints/
      latest_checkpointed_iteration.txt   iteration of the newest whole checkpoint
      iter_0000100/                       what the engine wrote (sharded), and
        run_state.json                    recipe, iteration, ledger of sample digests
        loader_00000.json …               loader state of each data-parallel rank

A folder whose name starts with a dot was never finished; it is removed at the next save.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from models.contract.errors import ConfigError, RunError
from models.contract.recipe import Recipe, differences
from models.training.engine import Engine
from models.training.interruption import signals_held
from models.training.loader_resharding import loader_state_for

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE_FILE = "run_state.json"
EXECUTION_KEYS = {
    "model": {"attention_backend"},
    "train": {"micro_batch_size", "log_interval", "manual_gc_interval"},
    "precision": {"recompute", "recompute_num_layers", "recompute_vision"},
}
"""Recipe keys that say how, not what: a run may go on with other values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a checkpoint knows besides the engine's own state."""

    iteration: int
    consumed_train_samples: int
    engine: str
    layout: dict[str, int]
    identity: dict[str, Any]
    """The recipe without what only says how to run it."""
    has_optimizer: bool
    sample_digests: list[str]
    num_skipped: int = 0


def training_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that a resumed run must share: everything but the layout and the like."""
    data = recipe.model_dump(
        mode="json",
        exclude={"name", "description", "notes", "hardware", "num_processes", "parallel", "checkpoint"},
    )
    for section, keys in EXECUTION_KEYS.items():
        data[section] = {key: value for key, value in data[section].items() if key not in keys}
    return data


class Saver:
    """Writes the checkpoints of a run, in the background where the recipe says so. Every rank calls every method."""

    def __init__(self, run: Path, engine: Engine, *, keep_last: int, is_async: bool) -> None:
        self._root, self._engine = run / FOLDER, engine
        self._keep_last, self._is_async = keep_last, is_async
        self._pending: tuple[Path, Path] | None = None

    def start(self, state: RunState, loader_state: Any) -> None:
        """Save a checkpoint, or begin to.

        Raises:
            RunError: a rank could not write (disk full); the checkpoints before it stay as they are.
        """
        self.finish()
        ranks = self._engine.ranks
        final = self._root / f"iter_{state.iteration:07d}"
        partial = self._root / f".iter_{state.iteration:07d}.partial"

        def prepare() -> None:
            if ranks.rank == 0:
                _fresh_folder(self._root, partial)

        def describe() -> None:
            if ranks.counts_samples:
                _write_json(partial / f"loader_{ranks.dp_rank:05d}.json", loader_state)
            if ranks.rank == 0:
                _write_json(partial / STATE_FILE, asdict(state))

        def write() -> None:
            with signals_held():
                self._engine.save(partial, with_optimizer=state.has_optimizer, is_async=self._is_async)

        for action in (prepare, write, describe):
            self._together(partial, action)
        self._pending = (partial, final)
        if not self._is_async:
            self.finish()

    def poll(self) -> None:
        """Publish a background save that has ended."""
        self._publish(is_blocking=False)

    def finish(self) -> None:
        """Wait for a background save and publish it."""
        self._publish(is_blocking=True)

    def _publish(self, *, is_blocking: bool) -> None:
        if self._pending is None:
            return
        partial, final = self._pending
        is_written = False

        def check() -> None:
            nonlocal is_written
            is_written = self._engine.is_save_finished(is_blocking=is_blocking)

        self._together(partial, check)
        if not is_written:
            return
        self._pending = None
        if self._engine.ranks.rank == 0:
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _write_text(self._root / TRACKER_FILE, f"{int(final.name.removeprefix('iter_'))}\n")
            _retain(self._root, self._keep_last)
        self._engine.ranks.barrier()

    def _together(self, partial: Path, action: Callable[[], None]) -> None:
        """Run `action`; when it fails on any rank, every rank raises, and the partial folder goes."""
        try:
            action()
            problem = None
        except (OSError, EOFError, RuntimeError, CheckpointException) as error:
            problem = f"rank {self._engine.ranks.rank}: {error!r}"
        problems = [text for text in self._engine.ranks.exchange(problem) if text]
        if problems:
            self._pending = None
            if self._engine.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                "checkpoint could not be written", where=str(partial), got="; ".join(problems)[:2000],
                fix="free disk space or choose another --run-dir; the previous checkpoint is untouched",
            )  # fmt: skip


def latest_checkpoint(run: Path) -> Path | None:
    """Folder of the newest whole checkpoint, or None.

    Raises:
        RunError: the tracker names a checkpoint that is not there, or is not a number.
    """
    tracker = run / FOLDER / TRACKER_FILE
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    folder = run / FOLDER / f"iter_{int(text):07d}" if text.isdigit() else None
    if folder is None or not (folder / STATE_FILE).is_file():
        raise RunError(
            "the tracker file names no whole checkpoint", where=str(tracker), got=text,
            expected="the iteration of a folder beside it",
            fix="write the iteration of a whole checkpoint into it, or remove it to start again",
        )  # fmt: skip
    return folder


def read_state(folder: Path, recipe: Recipe) -> RunState:
    """Read and check what a checkpoint says about its run.

    Raises:
        ConfigError: it belongs to another recipe, the message names the keys that differ; or weights are all it holds.
    """
    state = RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    differing = differences(state.identity, training_identity(recipe), "in the checkpoint", "in the recipe")
    if differing:
        raise ConfigError(
            "the checkpoint belongs to another recipe", where=str(folder), got="; ".join(differing),
            fix="resume with the recipe it was made with, or start a new run",
        )  # fmt: skip
    if not state.has_optimizer:
        raise ConfigError(
            "the checkpoint holds no optimizer state: a run cannot go on from it", where=str(folder),
            expected="a checkpoint of a recipe with checkpoint.save_optimizer = true", got="save_optimizer = false",
            fix="convert it, and start a new run from its weights; set save_optimizer = true where runs are to resume",
        )  # fmt: skip
    return state


def read_loader_state(folder: Path, recipe: Recipe, dp_rank: int, dp_size: int) -> Any:
    """Loader state of one data-parallel rank, of the number that wrote the checkpoint or of another.

    Raises:
        ConfigError: the samples would not keep their order at this number of data-parallel ranks.
    """
    files = sorted(folder.glob("loader_*.json"))
    states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return loader_state_for(
        states, dp_rank, dp_size, micro_batch_size=recipe.train.micro_batch_size, where=str(folder)
    )


def _fresh_folder(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".iter_*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _retain(root: Path, keep_last: int) -> None:
    whole = sorted(folder for folder in root.glob("iter_*") if folder.is_dir())
    for folder in whole[:-keep_last]:
        doomed = root / f".{folder.name}.partial"
        folder.rename(doomed)  # so that a kill in the middle leaves nothing that looks whole
        shutil.rmtree(doomed)


def _write_json(path: Path, data: Any) -> None:
    _write_text(path, json.dumps(data, ensure_ascii=False))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
