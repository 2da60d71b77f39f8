# SPDX-License-Identifier: Apache-2.0
"""Where a run stands: what the loop carries from step to step, and what a checkpoint brings back."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from models.contract.architecture import Architecture
from models.contract.errors import RunError
from models.contract.recipe import Recipe
from models.contract.record import METRICS_FILE
from models.contract.site import Site
from models.training import checkpoint as checkpoints
from models.training.engine import Engine
from models.training.ledger import Ledger
from models.training.run_file import cut_metrics, recorded_digests

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How long and from where; nothing here changes a number."""

    is_resume: bool = False
    stop_after: int | None = None
    """Leave after this iteration, as if interrupted."""
    step_timeout_s: float = 1800.0
    """A step that takes longer is a hang."""
    peer_timeout_s: float = 600.0
    """How long the ranks wait for each other at the start."""
    checks_memory: bool = True
    """Refuse, before the model is built, what does not fit the device by the plan."""
    tensorboard: bool = False
    trace: int | None = None
    """Record this iteration, for a comparison with another run."""
    profile: int | None = None
    """Write where the time of this iteration goes."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Iterations and samples so far."""

    iteration: int = 0
    consumed_train_samples: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    expected_digests: dict[int, str] = field(default_factory=dict)
    """Digests of steps that a killed run had taken after its last checkpoint; they must come again."""

    def advance(self, num_samples: int, keys: list[str]) -> str:
        """Count one finished step; returns the digest of its samples.

        Raises:
            RunError: a repeated step did not see the samples it saw before the run was killed.
        """
        self.iteration += 1
        self.consumed_train_samples += num_samples
        digest = self.ledger.add(keys)
        expected = self.expected_digests.get(self.iteration, digest)
        if digest != expected:
            raise RunError(
                "the resumed run sees other samples than the first one did",
                where=f"iteration {self.iteration}",
                expected=expected,
                got=digest,
                fix="check that the dataset and num_processes are unchanged, or start a new run",
            )
        return digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything one run is made of."""

    recipe: Recipe
    site: Site
    architecture: Architecture
    directory: Path
    options: TrainOptions
    engine: Engine
    loader: Any
    progress: Progress
    saver: checkpoints.Saver

    @property
    def last_iteration(self) -> int:
        """Where this process leaves."""
        return min(self.recipe.train.train_iters, self.options.stop_after or self.recipe.train.train_iters)


class Resumable(NamedTuple):
    """What a run left behind."""

    recorded: dict[int, str]
    """Digest of the samples of each recorded iteration."""
    checkpoint: tuple[Path, checkpoints.RunState] | None
    """The newest whole one."""


def find_resumable(recipe: Recipe, directory: Path) -> Resumable:
    """What to go on from, checked before minutes go into building the model.

    Raises:
        ConfigError: it belongs to another recipe, or has no optimizer state.
        RunError: it is not whole, or metrics and checkpoint disagree about which samples were consumed.
    """
    recorded = recorded_digests(directory)
    folder = checkpoints.latest_checkpoint(directory)
    if folder is None:
        logger.info("no checkpoint in %s: from the beginning", directory)
        return Resumable(recorded, None)
    state = checkpoints.read_state(folder, recipe)
    _check_ledger(state, recorded, folder)
    return Resumable(recorded, (folder, state))


def restore(
    recipe: Recipe,
    directory: Path,
    engine: Engine,
    loader: Any,
    found: Resumable,
) -> Progress:
    """Bring engine, loader and progress back to a checkpoint, or to the start without one.

    Nothing is changed on disk before everything has been read.

    Args:
        recipe: Of the run.
        directory: Its directory.
        engine: As it was built.
        loader: Likewise.
        found: By :func:`find_resumable`.

    Raises:
        ConfigError: the checkpoint belongs to another layout.
        RunError: it cannot be read.
    """
    ranks, progress = engine.ranks, Progress()
    if found.checkpoint is not None:
        folder, state = found.checkpoint
        checkpoints.require_resharding(state, recipe, ranks.layout, folder)
        checkpoints.read_checkpoint(folder, engine, same_layout=state.layout == ranks.layout)
        loader.load_state_dict(checkpoints.read_loader_state(folder, recipe, ranks.dp_rank, ranks.dp_size))
        progress.iteration = state.iteration
        progress.consumed_train_samples = state.consumed_train_samples
        progress.ledger = Ledger(state.sample_digests)
    progress.expected_digests = {
        iteration: digest for iteration, digest in found.recorded.items() if iteration > progress.iteration
    }
    ranks.barrier()  # nobody may save or cut before all have looked
    if ranks.rank == 0:
        cut_metrics(directory, progress.iteration)
    ranks.barrier()
    return progress


def save(run: Run) -> None:
    """Save where the run stands; every rank calls it."""
    state = checkpoints.RunState(
        iteration=run.progress.iteration,
        consumed_train_samples=run.progress.consumed_train_samples,
        engine=run.recipe.train.engine,
        layout=run.engine.ranks.layout,
        identity=checkpoints.training_identity(run.recipe),
        has_optimizer=run.recipe.checkpoint.save_optimizer,
        resharding=run.recipe.checkpoint.resharding,
        sample_digests=run.progress.ledger.steps,
    )
    run.saver.start(state, run.loader.state_dict())


def _check_ledger(state: checkpoints.RunState, recorded: dict[int, str], folder: Path) -> None:
    missing = [iteration for iteration in range(1, state.iteration + 1) if iteration not in recorded]
    if missing:
        logger.info(
            "%s lacks %d of the %d iterations before the checkpoint, iteration %d first",
            METRICS_FILE, len(missing), state.iteration, missing[0],
        )  # fmt: skip
    for iteration, saved in enumerate(state.sample_digests, start=1):
        found = recorded.get(iteration, saved)
        if found != saved:
            raise RunError(
                "metrics and checkpoint disagree about the samples",
                where=f"{folder}, iteration {iteration}",
                expected=saved,
                got=found,
                fix="one of them was edited; start a new run",
            )
