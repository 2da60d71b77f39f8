# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written beside, renamed when whole, named by a tracker file.

    checkpoints/
      latest_checkpointed_iteration.txt   iteration of the newest whole checkpoint
      iter_0000100/                       what the engine wrote (sharded), and
        run_state.json                    recipe, iteration, ledger of sample digests
        loader_00000.json …               loader state of each data-parallel rank
        files.json                        sizes of all files, to tell a copy that is not whole

A folder whose name starts with a dot was never finished; it is removed at the next save.
"""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from models.contract.errors import ConfigError, RunError
from models.contract.recipe import Recipe, differences
from models.contract.whole_file import write_whole
from models.training.engine import Engine
from models.training.interruption import signals_held
from models.training.loader_resharding import loader_state_for
from models.training.run_file import free_space

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE_FILE = "run_state.json"
FILES_FILE = "files.json"
MAX_LISTED_FILES = 5
READ_ERRORS = (
    OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, CheckpointException, CheckpointingException,
)  # fmt: skip
"""What a damaged file makes of reading it."""
EXECUTION_KEYS = {
    "model": {"attention_backend"},
    "data": {"max_skipped_fraction"},
    "train": {"micro_batch_size", "log_interval", "manual_gc_interval", "non_finite"},
    "precision": {"recompute", "recompute_num_layers", "recompute_vision"},
}
"""Recipe keys that say how, or when to stop: a run may go on with other values."""


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
    resharding: str = ""
    """`checkpoint.resharding` of the recipe; empty in a checkpoint of an earlier version."""


def training_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that a resumed run must share: everything but the layout and the like."""
    data = recipe.model_dump(
        mode="json",
        exclude={"name", "description", "notes", "hardware", "num_processes", "parallel", "checkpoint"},
    )
    if recipe.model.experts_backend != "grouped":
        # A checkpoint of an earlier version does not have it. Another one may not go on: buffers hold the experts in
        # another order, and with them the optimizer's states that `resharding = "data"` keeps.
        data["model"].pop("experts_backend")
    return {section: _without_execution(section, values) for section, values in data.items()}


def _without_execution(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in EXECUTION_KEYS.get(section, ())}


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

        def publish() -> None:
            if self._engine.ranks.rank == 0:
                _write_json(partial / FILES_FILE, _file_sizes(partial))
                _discard(final)
                partial.rename(final)
                iteration = int(final.name.removeprefix("iter_"))
                write_whole(self._root / TRACKER_FILE, f"{iteration}\n")
                _retain(self._root, self._keep_last, iteration)

        self._together(partial, check)
        if not is_written:
            return
        self._pending = None
        self._together(partial, publish)

    def _together(self, partial: Path, action: Callable[[], None]) -> None:
        """Run `action`; when it fails on any rank, every rank raises, and the partial folder goes."""
        try:
            action()
            problem = None
        except (OSError, EOFError, RuntimeError, CheckpointException) as error:
            problem = f"rank {self._engine.ranks.rank}: {_words(error)}"
        problems = [text for text in self._engine.ranks.exchange(problem) if text]
        if problems:
            self._pending = None
            space = free_space(self._root) if self._root.exists() else ""
            self._engine.ranks.barrier()
            if self._engine.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                "checkpoint could not be written", where=str(partial), got="; ".join([*problems, space])[:2000],
                fix="free disk space and go on with --resume; the checkpoints before it are untouched",
            )  # fmt: skip


def latest_checkpoint(run: Path) -> Path | None:
    """Folder of the newest whole checkpoint, or None.

    The tracker file says which it is. Without one it is the newest: a run may have been killed between the two.

    Raises:
        RunError: the tracker names a checkpoint that is not there, or is not a number.
    """
    tracker = run / FOLDER / TRACKER_FILE
    whole = _whole(run / FOLDER)
    if not tracker.exists():
        if whole:
            logger.info("%s is missing: going on from the newest checkpoint, %d", tracker, max(whole))
        return whole[max(whole)] if whole else None
    text = tracker.read_bytes()[:80].decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit()) or int(text) not in whole:
        raise RunError(
            "the tracker file names no whole checkpoint", where=str(tracker), got=repr(text),
            expected=f"one of the iterations {', '.join(map(str, sorted(whole)))}" if whole else "no tracker file: "
            "there is no whole checkpoint",
            fix="write the iteration of a whole checkpoint into it, or remove it to go on from the newest"
            if whole else "put the checkpoints back, or remove the file to start again",
        )  # fmt: skip
    return whole[int(text)]


def read_state(folder: Path, recipe: Recipe) -> RunState:
    """Read and check what a checkpoint says about its run; nothing needs to have been built for it.

    Raises:
        ConfigError: it belongs to another recipe, the message names the keys that differ; or weights are all it holds.
        RunError: it is not whole.
    """
    _check_files(folder)
    try:
        state = RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder / STATE_FILE, error) from error
    identity = {key: _without_execution(key, value) for key, value in state.identity.items()}
    differing = differences(identity, training_identity(recipe), "in the checkpoint", "in the recipe")
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


def read_checkpoint(folder: Path, engine: Engine, *, same_layout: bool) -> None:
    """Load the engine's part of a checkpoint.

    Raises:
        RunError: it cannot be read.
    """
    try:
        engine.load(folder, with_optimizer=True, same_layout=same_layout)
    except READ_ERRORS as error:
        raise _unreadable(folder, error) from error


def read_loader_state(folder: Path, recipe: Recipe, dp_rank: int, dp_size: int) -> Any:
    """Loader state of one data-parallel rank, of the number that wrote the checkpoint or of another.

    Raises:
        ConfigError: the samples would not keep their order at this number of data-parallel ranks.
        RunError: a state is missing or cannot be read.
    """
    files = sorted(folder.glob("loader_*.json"))
    try:
        states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return loader_state_for(
            states, dp_rank, dp_size, micro_batch_size=recipe.train.micro_batch_size, where=str(folder)
        )
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        raise _unreadable(folder / "loader_*.json", error) from error


def _check_files(folder: Path) -> None:
    """Compare the files with what was written. A checkpoint of an earlier version has no list of them."""
    try:
        listed = json.loads((folder / FILES_FILE).read_text(encoding="utf-8"))
        expected = {str(name): int(size) for name, size in listed.items()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(folder / FILES_FILE, error) from error
    found = _file_sizes(folder)
    problems = [
        f"{name} is missing" if name not in found else f"{name} has {found[name]} bytes, not {size}"
        for name, size in sorted(expected.items())
        if found.get(name) != size
    ]
    if problems:
        more = [f"{len(problems) - MAX_LISTED_FILES} more"] if len(problems) > MAX_LISTED_FILES else []
        raise RunError(
            "the checkpoint is not whole", where=str(folder), expected=f"{len(expected)} files as they were written",
            got="; ".join(problems[:MAX_LISTED_FILES] + more), fix=_other_checkpoint(folder),
        )  # fmt: skip


def require_resharding(state: RunState, recipe: Recipe, layout: dict[str, int], folder: Path) -> None:
    """Optimizer states lie as `checkpoint.resharding` said; as "data", another data-parallel size can read them.

    Raises:
        ConfigError: they cannot be read at this layout.
    """
    if state.engine != "megatron" or not state.resharding:
        return
    asked = recipe.checkpoint.resharding
    if asked != state.resharding:
        raise ConfigError(
            "the checkpoint's optimizer states lie otherwise", where=f"{folder}: checkpoint.resharding",
            expected=f"{state.resharding!r}, as they were written", got=f"{asked!r} in the recipe",
            fix="resume with the value it was written with; another needs a new run",
        )  # fmt: skip
    differing = [key for key in state.layout if key != "dp" and layout.get(key) != state.layout[key]]
    if asked == "data" and differing:
        raise ConfigError(
            "the checkpoint's optimizer states are for another layout", where=str(folder),
            expected=", ".join(f"{key} = {state.layout[key]}" for key in differing),
            got=", ".join(f"{key} = {layout.get(key)}" for key in differing),
            fix="resume at that layout; runs with checkpoint.resharding = 'any' may change it",
        )  # fmt: skip


def _unreadable(path: Path, error: BaseException) -> RunError:
    folder = path if path.is_dir() else path.parent
    return RunError(
        "the checkpoint cannot be read", where=str(path), got=_words(error), fix=_other_checkpoint(folder)
    )


def _other_checkpoint(folder: Path) -> str:
    others = [iteration for iteration, other in sorted(_whole(folder.parent).items()) if other != folder]
    text = "copy it again from where it is whole"
    if others:
        text += f", or write {others[-1]} into {TRACKER_FILE} to go on from the checkpoint of that iteration"
    return text


def _words(error: BaseException) -> str:
    """An error in one line; torch wraps those of all ranks into one with their stacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"{failure[0]!r}" for failure in error.failures.values())
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:500]}"


def _whole(root: Path) -> dict[int, Path]:
    """Whole checkpoints by iteration: a folder has this name from the moment on at which all of it is written."""
    found = {}
    for folder in root.glob("iter_*"):
        number = folder.name.removeprefix("iter_")
        if number.isascii() and number.isdigit() and (folder / STATE_FILE).is_file():
            found[int(number)] = folder
    return found


def _file_sizes(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.name not in (FILES_FILE, STATE_FILE)  # the state is read whole or not at all
    }


def _fresh_folder(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".iter_*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _retain(root: Path, keep_last: int, iteration: int) -> None:
    """Keep the newest up to `iteration`. Later ones, of a run that was set back, are replaced when it reaches them."""
    whole = _whole(root)
    for old in sorted(number for number in whole if number <= iteration)[:-keep_last]:
        _discard(whole[old])


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves nothing that looks whole."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old.partial")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _write_json(path: Path, data: Any) -> None:
    write_whole(path, json.dumps(data, ensure_ascii=False))
