# SPDX-License-Identifier: Apache-2.0
"""What one step leaves behind: a row of ``metrics.jsonl`` and a line of ``train.log`` in Megatron's format."""

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TextIO

from models.common.batch import Batch
from models.contract.architecture import Architecture
from models.contract.flops import (
    PARTS,
    megatron_flops,
    model_flops,
    tflops_per_gpu,
    tokens_per_second_per_gpu,
)
from models.contract.recipe import Recipe
from models.contract.record import LOG_FILE, StepMetrics, append_metrics
from models.training.run_file import written

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class BatchCounts:
    """What this rank's micro-batches of one step hold; added over data-parallel ranks."""

    num_rows: int = 0
    num_samples: int = 0
    num_padded_tokens: int = 0
    num_real_tokens: int = 0
    num_supervised_tokens: int = 0
    num_vision_tokens: int = 0
    num_images: int = 0
    num_videos: int = 0
    num_audios: int = 0
    megatron_flops: float = 0.0
    model_flops: float = 0.0

    @classmethod
    def of(cls, batches: Iterable[Batch], architecture: Architecture, recipe: Recipe) -> Self:
        """Count the micro-batches of this rank."""
        counts = cls()
        trainable = [part for part in PARTS if part not in recipe.model.freeze]
        for batch in batches:
            rows, length = batch.input_ids.shape
            counts.num_rows += rows
            counts.num_samples += len(batch.sample_keys)
            counts.num_padded_tokens += rows * length
            counts.num_real_tokens += batch.num_real_tokens
            counts.num_supervised_tokens += batch.num_supervised_tokens
            counts.num_vision_tokens += (
                0 if batch.vision_positions is None else batch.vision_positions.numel()
            )
            counts.num_images += batch.num_images
            counts.num_videos += batch.num_videos
            counts.num_audios += batch.num_audios
            counts.megatron_flops += megatron_flops(architecture.text, num_sequences=rows, seq_length=length)
            counts.model_flops += model_flops(
                architecture,
                sample_lengths=batch.sample_lengths,
                grid_thw=[] if batch.grid_thw is None else [tuple(grid) for grid in batch.grid_thw.tolist()],
                audio_frames=[] if batch.audio_lengths is None else batch.audio_lengths.tolist(),
                trainable=trainable,
            )
        return counts

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Add the counts of several ranks."""
        rows = [asdict(part) for part in parts]
        return cls(**{key: sum(row[key] for row in rows) for key in rows[0]})


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """Where the wall time of one step went, on this rank."""

    began: float
    moment: float
    laps: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each part."""

    @classmethod
    def start(cls) -> Self:
        """Start the clock."""
        now = time.perf_counter()
        return cls(began=now, moment=now)

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.laps[name] = (now - self.moment) * 1000
        self.moment = now

    @property
    def total_ms(self) -> float:
        """From the start to the end of the last part."""
        return (self.moment - self.began) * 1000


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Writes the run directory's metrics; only rank 0 has one."""

    directory: Path
    recipe: Recipe
    world_size: int
    on_terminal: bool
    use_tensorboard: bool = False
    _window: list[StepMetrics] = field(default_factory=list)
    _log: TextIO | None = None
    _progress: Any = None
    _events: Any = None

    def __enter__(self) -> Self:
        self._log = (self.directory / LOG_FILE).open("a", encoding="utf-8", buffering=1)
        if self.on_terminal:
            self._progress = _progress_bar()
            self._progress.start()
        if self.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.directory / "tensorboard"))
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            self._events.close()
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk has been told when the line was written
                self._log.close()

    def add(self, row: StepMetrics) -> None:
        """Write one step.

        Raises:
            RunError: the disk is full.
        """
        with written(self.directory):
            self._write(row)
        if self._progress is not None:
            _advance(self._progress, row, self.recipe)

    def _write(self, row: StepMetrics) -> None:
        append_metrics(self.directory, row)
        if self._events is not None:
            _write_scalars(self._events, row)
        self._window.append(row)
        if (
            row.iteration % self.recipe.train.log_interval == 0
            or row.iteration == self.recipe.train.train_iters
        ):
            self.note(log_line(self._window, self.recipe.train.train_iters, self.world_size))
            self._window.clear()

    def note(self, line: str) -> None:
        """Write one line to ``train.log``, and to standard output where no progress bar is drawn."""
        assert self._log is not None
        self._log.write(line + "\n")
        if self._progress is None:
            logger.info("%s", line)


def _write_scalars(events: Any, row: StepMetrics) -> None:
    """One TensorBoard scalar for every number of a step."""
    numbers = row.model_dump(exclude={"iteration", "sample_digest", "extra"}) | row.extra
    for name, value in numbers.items():
        if value is not None:
            events.add_scalar(name, value, row.iteration)


def log_line(rows: Sequence[StepMetrics], train_iters: int, world_size: int) -> str:
    """One line in Megatron-LM's format over the steps since the last one.

    Losses and times are means of the window; throughput is Megatron's: decoder only, padded tokens.
    """
    last = rows[-1]
    step_time_ms = sum(row.step_time_ms for row in rows) / len(rows)
    flops = sum(row.megatron_flops for row in rows) / len(rows)
    num_padded = sum(row.num_padded_tokens for row in rows) / len(rows)
    tflops = tflops_per_gpu(flops, step_time_ms=step_time_ms, world_size=world_size)
    rate = tokens_per_second_per_gpu(num_padded, step_time_ms=step_time_ms, world_size=world_size)
    losses = [row.lm_loss for row in rows if not row.num_nan_iterations] or [row.lm_loss for row in rows]
    fields = [
        f" [{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}] iteration {last.iteration:8d}/{train_iters:8d}",
        f"consumed samples: {last.consumed_train_samples:12d}",
        f"elapsed time per iteration (ms): {step_time_ms:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {tflops:.1f}",
        f"learning rate: {last.learning_rate:.6E}",
        f"global batch size: {last.global_batch_size:5d}",
        f"lm loss: {sum(losses) / len(losses):.6E}",
        *(f"{key.replace('_', ' ')}: {value:.6E}" for key, value in last.extra.items()),
        f"loss scale: {last.loss_scale:.1f}",
        f"grad norm: {last.grad_norm:.3f}",
        f"tokens/sec/gpu: {rate:.1f}",
        f"number of skipped iterations: {sum(row.num_skipped_iterations for row in rows):3d}",
        f"number of nan iterations: {sum(row.num_nan_iterations for row in rows):3d} |",
    ]
    return " | ".join(fields)


def _progress_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} padded tokens/s"),
    )  # fmt: skip


def _advance(progress: Any, row: StepMetrics, recipe: Recipe) -> None:
    rate = row.num_padded_tokens / (row.step_time_ms / 1000)
    if not progress.tasks:
        progress.add_task(recipe.name, total=recipe.train.train_iters, loss=row.lm_loss, rate=rate)
    progress.update(progress.tasks[0].id, completed=row.iteration, loss=row.lm_loss, rate=rate)
