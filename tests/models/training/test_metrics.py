# SPDX-License-Identifier: Apache-2.0
"""What a step leaves behind: Megatron's log line, the row of metrics.jsonl, TensorBoard events."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.common.batch import Batch
from models.contract.families import published_architecture
from models.contract.recipe import Recipe
from models.contract.record import METRICS_FILE, StepMetrics
from models.training.metrics import BatchCounts, Recorder, log_line

MakeRecipe = Callable[..., Recipe]
PUBLISHED_LINES = [
    (5533.0, "560.9", "11844.5"), (5859.3, "529.7", "11185.0"), (5546.0, "559.6", "11816.9"),
    (5622.0, "552.0", "11657.0"),
]  # fmt: skip
"""Step time of a line of the published Qwen2.5-VL-7B log, and the two rates that it prints."""


def padded_batch(rows: int, length: int) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return Batch(
        input_ids=ids, position_ids=ids.expand(3, rows, length), sample_keys=tuple("abcd"[:rows]),
        sample_lengths=(300,) * rows, num_real_tokens=300 * rows, num_supervised_tokens=20 * rows, num_images=rows,
        vision_positions=torch.arange(200 * rows), grid_thw=torch.tensor([[1, 20, 40]] * rows),
    )  # fmt: skip


def row_of(counts: BatchCounts, step_time_ms: float = 1.0, **changes: object) -> StepMetrics:
    fields = {
        "iteration": 500, "consumed_train_samples": 32000, "lm_loss": 1.59657, "grad_norm": 11.199,
        "learning_rate": 1e-6, "global_batch_size": 64, "step_time_ms": step_time_ms,
        "num_padded_tokens": counts.num_padded_tokens, "num_real_tokens": counts.num_real_tokens,
        "num_supervised_tokens": counts.num_supervised_tokens, "megatron_flops": counts.megatron_flops,
    }  # fmt: skip
    return StepMetrics.model_validate(fields | changes)


@pytest.mark.parametrize(("step_time_ms", "tflops", "tokens"), PUBLISHED_LINES)
def test_log_line_reproduces_the_published_rates(
    step_time_ms: float, tflops: str, tokens: str, make_recipe: MakeRecipe
) -> None:
    architecture = published_architecture("qwen2_5_vl_7b")
    counts = BatchCounts.of([padded_batch(1, 8192) for _ in range(64)], architecture, make_recipe())
    fields = dict(
        part.strip().rsplit(": ", 1)
        for part in log_line([row_of(counts, step_time_ms)], 500, 8).split(" | ")
        if ": " in part
    )
    # The log prints five digits of its step time, so the last digit of a rate may differ by one.
    assert float(fields["throughput per GPU (TFLOP/s/GPU)"]) == pytest.approx(float(tflops), abs=0.1001)
    assert float(fields["tokens/sec/gpu"]) == pytest.approx(float(tokens), abs=0.1001)
    assert fields["lm loss"] == "1.596570E+00"


def test_counts_tell_padded_real_and_supervised_tokens_apart(make_recipe: MakeRecipe) -> None:
    architecture = published_architecture("qwen2_5_vl_7b")
    parts = [
        BatchCounts.of([padded_batch(2, 512), padded_batch(1, 512)], architecture, make_recipe())
        for _ in range(2)
    ]
    total = BatchCounts.total(parts)
    assert (total.num_padded_tokens, total.num_real_tokens, total.num_supervised_tokens) == (3072, 1800, 120)
    assert (total.num_vision_tokens, total.num_images, total.num_samples, total.num_rows) == (1200, 6, 6, 6)
    assert total.model_flops > 0
    assert total.megatron_flops == 2 * parts[0].megatron_flops


def test_log_line_is_a_mean_over_its_window_and_counts_what_went_wrong() -> None:
    counts = BatchCounts(num_padded_tokens=100, megatron_flops=1e12)
    rows = [
        row_of(counts, 10.0, lm_loss=2.0),
        row_of(counts, 30.0, lm_loss=float("nan"), num_nan_iterations=1, num_skipped_iterations=1),
        row_of(counts, 20.0, lm_loss=1.0, extra={"load_balancing_loss": 1.25}),
    ]
    line = log_line(rows, 500, 1)
    assert "elapsed time per iteration (ms): 20.0 |" in line
    assert "lm loss: 1.500000E+00 |" in line
    assert "load balancing loss: 1.250000E+00 |" in line
    assert "number of skipped iterations:   1 | number of nan iterations:   1 |" in line
    assert "throughput per GPU (TFLOP/s/GPU): 50.0 |" in line


def test_recorder_writes_every_number_to_tensorboard(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counts = BatchCounts(num_padded_tokens=100, num_real_tokens=80, num_supervised_tokens=9)
    rows = [
        row_of(counts, iteration=step, lm_loss=3.0 / step, extra={"load_balancing_loss": 1.5})
        for step in (1, 2, 3)
    ]
    with Recorder(
        directory=tmp_path, recipe=make_recipe(), world_size=1, on_terminal=False, use_tensorboard=True
    ) as recorder:
        for row in rows:
            recorder.add(row)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    numbers = (
        rows[0].model_dump(exclude={"iteration", "sample_digest", "extra", "eval_lm_loss"}) | rows[0].extra
    )
    assert set(events.Tags()["scalars"]) == set(numbers)
    assert [(event.step, event.value) for event in events.Scalars("lm_loss")] == [
        (1, 3.0), (2, 1.5), (3, 1.0),
    ]  # fmt: skip
    assert events.Scalars("num_supervised_tokens")[0].value == 9
    written = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["lm_loss"] for row in written] == [3.0, 1.5, 1.0]
