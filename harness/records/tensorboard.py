# SPDX-License-Identifier: Apache-2.0
"""Reader of TensorBoard event files, as Megatron-LM, Pai-Megatron-Patch and Megatron-Bridge write them."""

import logging
from pathlib import Path

from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS, TIMESTAMP, Rows, RunRecord, brief

COLUMN_OF_TAG = {
    "lm loss": "lm_loss",
    "grad-norm": "grad_norm",
    "learning-rate": "learning_rate",
    "loss-scale": "loss_scale",
    "batch-size": "global_batch_size",
    "iteration-time": "step_time_ms",
    "throughput": REPORTED_TFLOPS,
    "throughput/device/tflops": REPORTED_TFLOPS,
    "throughput/device/tokens_per_sec": REPORTED_TOKENS,
    "mem-max-allocated-bytes": "peak_memory_bytes",
    "lm loss validation": "eval_lm_loss",
}
"""Tags by iteration. Tags ending in `` vs samples`` repeat them on another axis and are left out."""
_SECONDS_TAGS = frozenset({"iteration-time"})
"""Written in seconds."""
EVENT_GLOB = "events.out.tfevents.*"


def event_files(path: Path) -> list[Path]:
    """Event files directly in `path`, or `path` itself; sorted by name, which is by start time."""
    if path.is_file():
        return [path] if path.match(EVENT_GLOB) else []
    return sorted(path.glob(EVENT_GLOB))


def read_tensorboard(path: Path) -> RunRecord:
    """Read all event files of one run. Several files are several attempts; the last value of a step is kept."""
    problems: list[str] = []
    steps: dict[int, dict[str, float]] = {}
    counts: dict[tuple[str, int], int] = {}
    files = event_files(path)
    for file in files:
        problems += _read_file(file, steps, counts)
    rows = Rows()
    for iteration in sorted(steps):
        rows.add({"iteration": iteration, **steps[iteration]}, f"step {iteration}")
    repeated = [step for (column, step), count in counts.items() if column == "lm_loss" and count > 1]
    problems += [f"duplicate_iteration: iteration {step} is there more than once" for step in repeated]
    if not steps:
        problems.append("no_iterations: no known scalar in the event files")
    iterations = sorted(steps)
    stride = iterations[1] - iterations[0] if len(iterations) > 1 else 1
    return RunRecord(
        series=rows.series(),
        info=None,
        source=str(path),
        framework="tensorboard",
        problems=brief(problems),
        known=rows.known(),
        log_interval=stride if iterations and iterations[0] in {1, stride} else 1,
        notes=(f"{len(files)} event files: several attempts of one run",) if len(files) > 1 else (),
    )


def _read_file(
    file: Path, steps: dict[int, dict[str, float]], counts: dict[tuple[str, int], int]
) -> list[str]:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    try:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                column = COLUMN_OF_TAG.get(value.tag)
                if column is None or event.step < 1:
                    continue
                number = float(tensor_util.make_ndarray(value.tensor).item())
                scale = 1000.0 if value.tag in _SECONDS_TAGS else 1.0
                steps.setdefault(event.step, {TIMESTAMP: event.wall_time})[column] = number * scale
                counts[column, event.step] = counts.get((column, event.step), 0) + 1
    except (DecodeError, ValueError, TypeError, OSError) as error:
        return [f"torn_file: {file.name} cannot be read to its end: {type(error).__name__}"]
    return []
