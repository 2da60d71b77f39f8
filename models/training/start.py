# SPDX-License-Identifier: Apache-2.0
"""From a recipe and a launcher's environment to a run: engine, loader, run directory, and a clean end."""

import contextlib
import functools
import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from models.common.settings import (
    resolve_attention_backend,
    with_experts_backend,
    with_token_dispatcher,
)
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError, RunError
from models.contract.families import load_architecture
from models.contract.launcher import LauncherEnvironment, read_launcher_environment
from models.contract.layout import require_layout
from models.contract.plan import GIB, plan_training, require_fit
from models.contract.recipe import Recipe
from models.contract.record import RunInfo, write_run_info
from models.contract.site import Site
from models.datasets.loader import build_loader
from models.training.checkpoint import Saver
from models.training.engine import Engine
from models.training.environment import describe_environment, describe_hardware, device_memory_bytes
from models.training.evaluation import require_held_out
from models.training.interruption import StopRequest, Watchdog, stop_requests
from models.training.loop import train_steps
from models.training.metrics import Recorder
from models.training.parallel import stop_distributed
from models.training.processes import pick_device, require_processes
from models.training.progress import Progress, Run, TrainOptions, find_resumable, restore
from models.training.rendezvous import ranks_met
from models.training.run_file import (
    claim_directory,
    directory_held,
    failures_recorded,
    record_failure,
    require_free,
    utc_now,
    written,
)

logger = logging.getLogger(__name__)

ENGINES = {"megatron": "models.training.megatron_engine", "fsdp2": "models.training.fsdp2"}
MAX_LISTED_SKIPS = 100


def train(recipe: Recipe, site: Site, directory: Path, options: TrainOptions) -> str:
    """Train one recipe into one run directory; every process of the launcher calls it.

    Returns: the outcome: ``completed`` or ``interrupted``.

    Raises:
        HarnessError: what cannot run is refused before the first step; what fails later is in ``run.json`` too.
    """
    launcher = read_launcher_environment()
    require_processes(recipe, launcher)
    is_writer = launcher.rank == 0
    if is_writer:
        require_free(directory, is_resume=options.is_resume)
    meeting = ranks_met(launcher, recipe, timeout_s=options.peer_timeout_s)
    with meeting, directory_held(directory) if is_writer else nullcontext():
        progress = train_together(recipe, site, directory, options, launcher)
    gc.collect()  # the groups go with the engine, and their threads with them
    return "completed" if progress.iteration == recipe.train.train_iters else "interrupted"


def train_together(
    recipe: Recipe, site: Site, directory: Path, options: TrainOptions, launcher: LauncherEnvironment
) -> Progress:
    """Train once all ranks are there. The directory is claimed now: before, the same command could be given again."""
    info = None
    if launcher.rank == 0:
        world_size = launcher.world_size
        info = claim_directory(directory, recipe, world_size=world_size, is_resume=options.is_resume)

    def on_hang(message: str) -> None:
        record_failure(
            directory, launcher.rank, RunError(message, fix="look for the rank whose stack differs")
        )

    with (
        failures_recorded(directory, launcher.rank),
        stop_requests() as stop,
        Watchdog(directory / "stacks", launcher.rank, options.step_timeout_s, on_hang) as watchdog,
    ):
        engine_module = importlib.import_module(ENGINES[recipe.train.engine])
        with engine_module.device_patches() as patches:
            try:
                start_engine = functools.partial(engine_module.start_engine, patches=patches)
                run = start_run(recipe, site, directory, options, launcher, start_engine)
                with closing(run.loader):
                    run_to_end(run, info, stop, watchdog)
                run.engine.close()
            finally:
                stop_distributed()
    return run.progress


def start_run(
    recipe: Recipe,
    site: Site,
    directory: Path,
    options: TrainOptions,
    launcher: LauncherEnvironment,
    start_engine: Callable[..., Engine],
) -> Run:
    """Bring up engine and loader, from the checkpoint of the recipe or from where the run left off."""
    folder = site.checkpoint(recipe.model.checkpoint)
    architecture = load_architecture(folder)
    require_layout(architecture, recipe)
    require_held_out(recipe, site)
    recipe = with_experts_backend(recipe, architecture, pick_device(launcher.local_rank).type)
    recipe = with_token_dispatcher(recipe, architecture)
    found = find_resumable(recipe, directory) if options.is_resume else None
    if options.checks_memory:
        require_memory(recipe, architecture, launcher)
    engine = start_engine(recipe, architecture, folder, launcher, timeout_s=options.step_timeout_s)
    ranks = engine.ranks
    loader = build_loader(
        recipe, site, architecture,
        split="train", data_parallel_rank=ranks.dp_rank, data_parallel_size=ranks.dp_size,
    )  # fmt: skip
    progress = restore(recipe, directory, engine, loader, found) if found else Progress()
    require_taken("--trace", options.trace, recipe, options, progress)
    require_taken("--profile", options.profile, recipe, options, progress)
    settings = recipe.checkpoint
    saver = Saver(directory, engine, keep_last=settings.keep_last, is_async=settings.async_save)
    return Run(
        recipe=recipe, site=site, architecture=architecture, directory=directory, options=options,
        engine=engine, loader=loader, progress=progress, saver=saver,
    )  # fmt: skip


def require_memory(recipe: Recipe, architecture: Architecture, launcher: LauncherEnvironment) -> None:
    """Check that the planned memory fits this rank's device, before minutes go into building the model.

    Raises:
        ConfigError: it does not; it names the smallest change that fits.
    """
    device = pick_device(launcher.local_rank)
    if device.type != "cpu":
        memory_gib = device_memory_bytes(device) / GIB
        backend = resolve_attention_backend(recipe.model.attention_backend, device.type)
        model = recipe.model.model_copy(update={"attention_backend": backend})
        planned = recipe.model_copy(update={"model": model})  # torch's kernels, which take over, need more
        require_fit(plan_training(planned, architecture, memory_gib=memory_gib, bf16_tflops=None), recipe)


def require_taken(
    name: str, asked: int | None, recipe: Recipe, options: TrainOptions, progress: Progress
) -> None:
    """Check that an iteration to record is one that this process takes.

    Raises:
        ConfigError: it is not.
    """
    first = progress.iteration + 1
    last = min(recipe.train.train_iters, options.stop_after or recipe.train.train_iters)
    if asked is not None and not first <= asked <= last:
        raise ConfigError(
            "the iteration to record is not taken", where=name, expected=f"{first} to {last}",
            got=str(asked), fix="choose one of these, or start a new run",
        )  # fmt: skip


def run_to_end(run: Run, info: RunInfo | None, stop: StopRequest, watchdog: Watchdog) -> None:
    """Describe the run, train, and write how it ended. Rank 0 has the `info`."""
    num_parameters = run.engine.num_parameters()
    recorder: Any = nullcontext()
    if info is not None:
        _describe(info, run, num_parameters)
        with written(run.directory):
            write_run_info(run.directory, info)
        recorder = Recorder(
            directory=run.directory, recipe=run.recipe, world_size=run.engine.ranks.world_size,
            on_terminal=sys.stderr.isatty(), use_tensorboard=run.options.tensorboard,
        )  # fmt: skip
    try:
        with recorder as writer, _manual_gc(run.recipe):
            train_steps(run, writer, stop, watchdog)
            run.saver.finish()
    except BaseException:
        if info is not None:  # the other ranks may be gone: tell what this one knows
            _account(info, run, run.loader.skipped)
            with contextlib.suppress(OSError):  # the error on its way says more
                write_run_info(run.directory, info)
        raise
    ranks = run.engine.ranks
    everyone = ranks.exchange((run.loader.skipped, ranks.counts_samples))
    if info is not None:
        _account(info, run, [sample for samples, speaks in everyone if speaks for sample in samples])
        info.outcome.status = (
            "completed" if run.progress.iteration == run.recipe.train.train_iters else "interrupted"
        )
        info.outcome.phase = "done"
        info.ended_at = utc_now()
        with written(run.directory):
            write_run_info(run.directory, info)
    ranks.barrier()


def _describe(info: RunInfo, run: Run, num_parameters: dict[str, int]) -> None:
    device = run.engine.ranks.device
    info.layout = run.engine.ranks.layout
    info.hardware = describe_hardware(device)
    info.environment = describe_environment(run.recipe, device, run.engine.patches)
    info.num_parameters = num_parameters
    info.outcome.phase = "training"


def _account(info: RunInfo, run: Run, skipped: list[dict[str, str]]) -> None:
    counts = {"consumed": run.progress.consumed_train_samples, "skipped": len(skipped)}
    for sample in skipped:
        key = f"skipped:{sample['reason']}"
        counts[key] = counts.get(key, 0) + 1
    info.sample_counts, info.skipped_samples = counts, skipped[:MAX_LISTED_SKIPS]
    info.data_order_digest = run.progress.ledger.digest()
    info.outcome.iteration = run.progress.iteration


@contextmanager
def _manual_gc(recipe: Recipe) -> Iterator[None]:
    """Switch automatic collection off while the loop collects by itself.

    What imports and the model left in memory stays while it trains. Walked at every collection it held training up for
    0.3 to 0.6 seconds (beside an H200), in which a small model takes three steps.
    """
    if not recipe.train.manual_gc_interval:
        yield
        return
    gc.disable()
    is_ours = gc.get_freeze_count() == 0
    if is_ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()
        gc.enable()
