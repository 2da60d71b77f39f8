# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

import gc
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from models.common.batch import Batch
from models.contract.errors import DataError, RunError
from models.contract.recipe import Recipe
from models.contract.record import StepMetrics, to_json_number
from models.training.engine import Engine, UpdateResult, mean_auxiliary, mean_loss
from models.training.environment import peak_memory_bytes
from models.training.evaluation import evaluate
from models.training.interruption import StopRequest, Watchdog
from models.training.kernel_profile import profiled_step
from models.training.loss import loss_denominator
from models.training.metrics import BatchCounts, Recorder, StepTimes
from models.training.progress import Run, save
from models.training.run_file import written
from models.training.trace import traced_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank tells the others before a step."""

    counts: BatchCounts
    keys: list[str]
    denominator: float
    dp_rank: int
    stop: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """What all data-parallel ranks together are about to train on."""

    counts: BatchCounts
    keys: list[str]
    denominator: float
    stop: str | None


def train_steps(run: Run, recorder: Recorder | None, stop: StopRequest, watchdog: Watchdog) -> None:
    """Train until the recipe's end, `stop_after`, or a signal. Rank 0 has a recorder."""
    recipe, engine, progress = run.recipe, run.engine, run.progress
    steps = micro_batches(run.loader, recipe.num_microbatches)
    while progress.iteration < run.last_iteration:
        watchdog.beat()
        with profiled_step(run):
            times = StepTimes.start()
            batches = next(steps)
            whole = share_batch(batches, run, stop)
            times.lap("data")

            with traced_step(run, batches, whole.denominator):
                sums = engine.forward_backward(
                    batches, denominator=whole.denominator, num_padded_tokens=whole.counts.num_padded_tokens
                )
            parts = engine.ranks.exchange((sums, peak_memory_bytes(engine.ranks.device)))
            loss = mean_loss([sums for sums, _ in parts])
            times.lap("forward_backward")

            update = guarded_update(engine, recipe, loss)
            times.lap("optimizer")

        digest = progress.advance(recipe.train.global_batch_size, whole.keys)
        is_last = progress.iteration == recipe.train.train_iters
        eval_loss = evaluate(run, watchdog) if _is_due(recipe.train.eval_interval, run) else None
        if recorder is not None:
            row = step_row(run, whole.counts, times, loss, update)
            row.sample_digest, row.eval_lm_loss = digest, eval_loss
            row.extra = row.extra | mean_auxiliary([sums for sums, _ in parts])
            row.peak_memory_bytes = max(peak for _, peak in parts)
            recorder.add(row)
        if not math.isfinite(loss) or not (update.is_updated or update.is_overflow):
            handle_non_finite(run, loss, update, whole.keys)
        ends_early = not is_last and (whole.stop is not None or progress.iteration == run.last_iteration)
        if _saves_now(recipe, progress.iteration, is_last=is_last, ends_early=ends_early):
            save(run)
        run.saver.poll()
        collect_garbage(recipe, progress.iteration)
        if ends_early:
            return


def micro_batches(loader: Iterator[Batch], num_microbatches: int) -> Iterator[list[Batch]]:
    """Group the loader's micro-batches into steps.

    Raises:
        DataError: the dataset ends in the middle of a run.
    """
    while True:
        batches = list(itertools.islice(loader, num_microbatches))
        if len(batches) < num_microbatches:
            raise DataError("dataset exhausted", fix="lower train_iters or add data")
        yield batches


def share_batch(batches: list[Batch], run: Run, stop: StopRequest) -> GlobalBatch:
    """Tell the other ranks what this one is about to train on, and learn what the whole batch is."""
    ranks, reduction = run.engine.ranks, run.recipe.train.loss_reduction
    mine = Share(
        counts=BatchCounts.of(batches, run.architecture, run.recipe),
        keys=[key for batch in batches for key in batch.sample_keys],
        denominator=sum(loss_denominator(batch, reduction) for batch in batches),
        dp_rank=ranks.dp_rank,
        stop=stop.signal_name,
    )
    everyone = ranks.exchange((mine, ranks.counts_samples))
    shares = sorted((share for share, speaks in everyone if speaks), key=lambda share: share.dp_rank)
    return GlobalBatch(
        counts=BatchCounts.total([share.counts for share in shares]),
        keys=[key for share in shares for key in share.keys],
        denominator=sum(share.denominator for share in shares),
        stop=next((share.stop for share, _ in everyone if share.stop), None),
    )


def guarded_update(engine: Engine, recipe: Recipe, loss: float) -> UpdateResult:
    """Step the optimizer, unless the loss is not a number: then weights and schedule stay as they are."""
    if math.isfinite(loss):
        return engine.update()
    engine.discard()
    return UpdateResult(is_updated=False, grad_norm=math.nan, learning_rate=engine.learning_rate())


def handle_non_finite(run: Run, loss: float, update: UpdateResult, keys: list[str]) -> None:
    """Save the keys of a step whose loss or gradient is not finite; stop or go on, as the recipe says.

    Raises:
        RunError: the recipe's policy is to stop.
    """
    iteration = run.progress.iteration
    path = run.directory / f"non_finite_{iteration:07d}.json"
    if run.engine.ranks.rank == 0:
        facts = {"iteration": iteration, "lm_loss": loss, "grad_norm": update.grad_norm, "sample_keys": keys}
        with written(run.directory):
            path.write_text(json.dumps(to_json_number(facts), indent=1) + "\n", encoding="utf-8")
    if run.recipe.train.non_finite == "stop":
        raise RunError(
            "loss or gradient is not finite",
            where=f"iteration {iteration}",
            got=f"lm_loss = {loss}, grad_norm = {update.grad_norm}",
            fix=f"look at the samples listed in {path.name}; non_finite = 'skip' goes on without them",
        )


def step_row(
    run: Run, counts: BatchCounts, times: StepTimes, loss: float, update: UpdateResult
) -> StepMetrics:
    """The row of ``metrics.jsonl`` for the step that just finished."""
    return StepMetrics(
        iteration=run.progress.iteration,
        consumed_train_samples=run.progress.consumed_train_samples,
        lm_loss=loss,
        grad_norm=update.grad_norm,
        learning_rate=update.learning_rate,
        loss_scale=update.loss_scale,
        global_batch_size=run.recipe.train.global_batch_size,
        step_time_ms=times.total_ms,
        data_time_ms=times.laps["data"],
        forward_backward_time_ms=times.laps["forward_backward"],
        optimizer_time_ms=times.laps["optimizer"],
        num_padded_tokens=counts.num_padded_tokens,
        num_real_tokens=counts.num_real_tokens,
        num_supervised_tokens=counts.num_supervised_tokens,
        num_vision_tokens=counts.num_vision_tokens,
        num_images=counts.num_images,
        num_videos=counts.num_videos,
        num_audios=counts.num_audios,
        num_skipped_iterations=int(not update.is_updated),
        num_nan_iterations=int(not math.isfinite(loss)),
        megatron_flops=counts.megatron_flops,
        model_flops=counts.model_flops,
        extra=update.extra,
    )


def collect_garbage(recipe: Recipe, iteration: int) -> None:
    """Collect on every rank at the same step, so that no rank waits for another's collection."""
    interval = recipe.train.manual_gc_interval
    if interval and iteration % interval == 0:
        gc.collect()


def _is_due(interval: int | None, run: Run) -> bool:
    iteration = run.progress.iteration
    return interval is not None and (iteration % interval == 0 or iteration == run.recipe.train.train_iters)


def _saves_now(recipe: Recipe, iteration: int, *, is_last: bool, ends_early: bool) -> bool:
    settings = recipe.checkpoint
    if is_last:
        return settings.save_final
    if ends_early:  # a run that keeps a checkpoint at all must be able to go on
        return settings.save_final or settings.save_interval is not None
    return settings.save_interval is not None and iteration % settings.save_interval == 0
