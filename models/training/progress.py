# SPDX-License-Identifier: Apache-2.0
"""Where a run stands: what the loop carries from step to step, and what a checkpoint brings back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.contract.architecture import Architecture
from models.contract.errors import RunError
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training import checkpoint as checkpoints
from models.training.engine import Engine
from models.training.ledger import Ledger
from models.training.run_file import cut_metrics


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
    tensorboard: bool = False
    trace: int | None = None
    """Record this iteration, for a comparison with another run."""


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


def restore(recipe: Recipe, directory: Path, engine: Engine, loader: Any) -> Progress:
    """Bring engine, loader and progress back to the newest whole checkpoint, or to the start without one.

    Raises:
        ConfigError: the checkpoint belongs to another recipe or has no optimizer state.
        RunError: metrics and checkpoint disagree about which samples were consumed.
    """
    ranks = engine.ranks
    folder = checkpoints.latest_checkpoint(directory)
    ranks.barrier()  # nobody may save or cut before all have looked
    state = None if folder is None else checkpoints.read_state(folder, recipe)
    iteration = 0 if state is None else state.iteration
    kept, dropped = cut_metrics(directory, iteration, is_writer=ranks.rank == 0)
    ranks.barrier()
    if state is None or folder is None:
        return Progress(expected_digests=dropped)
    _check_ledger(state.sample_digests, kept, folder)
    engine.load(folder, with_optimizer=True, same_layout=state.layout == ranks.layout)
    loader.load_state_dict(checkpoints.read_loader_state(folder, recipe, ranks.dp_rank, ranks.dp_size))
    return Progress(
        iteration=state.iteration,
        consumed_train_samples=state.consumed_train_samples,
        ledger=Ledger(state.sample_digests),
        expected_digests=dropped,
    )


def save(run: Run) -> None:
    """Save where the run stands; every rank calls it."""
    state = checkpoints.RunState(
        iteration=run.progress.iteration,
        consumed_train_samples=run.progress.consumed_train_samples,
        engine=run.recipe.train.engine,
        layout=run.engine.ranks.layout,
        identity=checkpoints.training_identity(run.recipe),
        has_optimizer=run.recipe.checkpoint.save_optimizer,
        sample_digests=run.progress.ledger.steps,
    )
    run.saver.start(state, run.loader.state_dict())


def _check_ledger(saved: list[str], kept: dict[int, str], folder: Path) -> None:
    for iteration, digest in kept.items():
        if saved[iteration - 1] != digest:
            raise RunError(
                "metrics and checkpoint disagree about the samples",
                where=f"{folder}, iteration {iteration}",
                expected=saved[iteration - 1],
                got=digest,
                fix="one of them was edited; start a new run",
            )
