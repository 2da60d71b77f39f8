# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

from models.contract.record import (
    METRICS_FILE,
    RunInfo,
    StepMetrics,
    append_metrics,
    iter_metrics,
    read_run_info,
    write_run_info,
)


def step(iteration: int, loss: float) -> StepMetrics:
    return StepMetrics(
        iteration=iteration,
        consumed_train_samples=8 * iteration,
        lm_loss=loss,
        grad_norm=1.0,
        learning_rate=1e-3,
        global_batch_size=8,
        step_time_ms=10.0,
        num_padded_tokens=512,
        num_real_tokens=100,
        num_supervised_tokens=20,
    )


def test_metrics_keep_full_float_precision(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    append_metrics(tmp_path, step(1, loss))
    assert [row["lm_loss"] for row in iter_metrics(tmp_path)] == [loss]


def test_metrics_stay_valid_json_when_not_finite(tmp_path: Path) -> None:
    for iteration, loss in enumerate((float("nan"), float("inf"), float("-inf")), start=1):
        append_metrics(tmp_path, step(iteration, loss))
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["lm_loss"] for line in lines] == ["nan", "inf", "-inf"]
    assert "NaN" not in "".join(lines)


def test_metrics_leave_out_a_torn_last_line(tmp_path: Path) -> None:
    append_metrics(tmp_path, step(1, 1.0))
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write('{"iteration": 2, "lm_l')
    assert [row["iteration"] for row in iter_metrics(tmp_path)] == [1]


def test_run_info_round_trips_and_is_replaced_whole(tmp_path: Path) -> None:
    info = RunInfo(
        run_id="r",
        recipe={},
        recipe_sha="0",
        family="qwen3_vl",
        command=[],
        started_at="2026-01-01T00:00:00Z",
        world_size=1,
    )
    write_run_info(tmp_path, info)
    info.outcome.status = "completed"
    write_run_info(tmp_path, info)
    assert read_run_info(tmp_path) == info
    assert not list(tmp_path.glob("*.partial"))
