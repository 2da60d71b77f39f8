# SPDX-License-Identifier: Apache-2.0
"""Sources as a crash, a copy tool or a wrong hand leaves them: a named problem in seconds, no traceback, no pass."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.grading import compare, grade
from harness.policy import Policy
from harness.records import load_record
from models.contract.record import METRICS_FILE, RUN_FILE
from suites.detection.synthetic import SyntheticRun, write_synthetic_run

RUN = SyntheticRun(train_iters=60)


def log_line(iteration: int | str, total: int | str = 40, clock: str = "2026-01-05 08:00:00") -> str:
    loss = 2.0 + 0.01 * (int(str(iteration)[-3:]) * 7 % 5)
    return (
        f" [{clock}] iteration {iteration:>8}/{total:>8} | consumed samples: {int(str(iteration)[-3:]) * 8:12} | "
        f"elapsed time per iteration (ms): 100.0 | learning rate: 1.0E-04 | global batch size:     8 | "
        f"lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.0 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |\n"
    )


WHOLE = "".join(map(log_line, range(1, 41)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(gzip.compress(WHOLE.encode()), id="gzip"),
        pytest.param(WHOLE.encode("utf-16"), id="utf-16"),
        pytest.param(b"\xef\xbb\xbf" + WHOLE.encode(), id="byte_order_mark"),
        pytest.param(WHOLE.replace("\n", "\r\n").encode(), id="crlf"),
        pytest.param("é".encode("latin-1") + WHOLE.encode(), id="stray_byte"),
    ],
)
def test_how_a_log_is_stored_does_not_matter(data: bytes, tmp_path: Path, policy: Policy) -> None:
    (tmp_path / "plain.log").write_text(WHOLE)
    (tmp_path / "stored.log").write_bytes(data)
    plain, stored = load_record(tmp_path / "plain.log"), load_record(tmp_path / "stored.log")
    assert stored.problems == ()
    assert stored.series.equals(plain.series)
    assert compare(stored, plain, policy).name == "PASS"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(gzip.compress(WHOLE.encode())[:200], "torn_file", id="gzip_cut"),
        pytest.param(gzip.compress(WHOLE.encode())[:20] + b"\0" * 90, "torn_file", id="gzip_damaged"),
        pytest.param((WHOLE + log_line(10**25)).encode(), "bad_iteration", id="iteration_of_26_digits"),
        pytest.param((WHOLE + log_line("9" * 5000)).encode(), "bad_iteration", id="iteration_of_5000_digits"),
        pytest.param(WHOLE.replace("/      40", "/ 2000000000").encode(), "bad_iteration", id="plan_of_2e9"),
        pytest.param(
            WHOLE.replace("/      40", "/ " + "9" * 30).encode(), "bad_iteration", id="plan_of_30_digits"
        ),
        pytest.param(
            (WHOLE + log_line(41, 41, "2026-13-45 99:99:99")).encode(), "bad_time", id="no_such_month"
        ),
        pytest.param(os.urandom(4096).replace(b"\x1f\x8b", b""), "no_iterations", id="binary"),
    ],
)
@pytest.mark.timeout(20)
def test_damaged_log_is_named(data: bytes, problem: str, tmp_path: Path, policy: Policy) -> None:
    (tmp_path / "a.log").write_bytes(data)
    (tmp_path / "whole.log").write_text(WHOLE)
    record, whole = load_record(tmp_path / "a.log"), load_record(tmp_path / "whole.log")
    assert any(text.startswith(problem) for text in record.problems)
    for verdict in (
        grade(record, None, policy),
        compare(record, whole, policy),
        compare(whole, record, policy),
    ):
        assert verdict.name == "INVALID"


def test_long_plan_is_refused_without_counting_through_it(tmp_path: Path, policy: Policy) -> None:
    (tmp_path / "a.log").write_text(WHOLE.replace("/      40", "/ 999999999"))
    gate = grade(load_record(tmp_path / "a.log"), None, policy).gate("C0")
    assert gate is not None
    assert "40 of 999999999 iterations: 41 is the first that is missing" in gate.summary


def row_with(**changes: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | changes if row["iteration"] == 10 else row for row in rows]

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"iteration": 10**25}, {"iteration": 10.0}, {"iteration": True}, {"iteration": -3}, {"iteration": None},
        {"lm_loss": 10**400}, {"lm_loss": -(10**400)}, {"lm_loss": [1.0]}, {"lm_loss": {}}, {"extra": {"a": {"b": 1}}},
        {"extra": [1]}, {"megatron_flops": "inf"}, {"model_flops": "nan"}, {"peak_memory_bytes": "nan"},
        {"forward_backward_time_ms": "inf"}, {"num_images": "nan"},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_row_is_invalid_on_either_side(
    changes: dict[str, Any], tmp_path: Path, policy: Policy
) -> None:
    good = load_record(write_synthetic_run(tmp_path / "good", RUN))
    write_synthetic_run(tmp_path / "bad", RUN)
    rows = [json.loads(line) for line in (tmp_path / "bad" / METRICS_FILE).read_text().splitlines()]
    text = "".join(json.dumps(row) + "\n" for row in row_with(**changes)(rows))
    (tmp_path / "bad" / METRICS_FILE).write_text(text)
    bad = load_record(tmp_path / "bad")
    for verdict in (grade(bad, None, policy), compare(bad, good, policy), compare(good, bad, policy)):
        assert verdict.name == "INVALID"


@pytest.mark.parametrize("value", [0.0, -1.0, "nan", "inf"])
def test_loss_by_transformers_that_is_none_is_invalid(value: object, tmp_path: Path, policy: Policy) -> None:
    good = load_record(write_synthetic_run(tmp_path / "good", RUN))

    def reports(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[0]["extra"] = {"hf_lm_loss": value}
        return rows

    bad = load_record(write_synthetic_run(tmp_path / "bad", RUN, change_rows=reports))
    verdict = compare(bad, good, policy)
    gate = verdict.gate("C1")
    assert verdict.name == "INVALID"
    assert gate is not None
    assert "by transformers is" in gate.summary


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"started_at": "x"}, id="no_time"),
        pytest.param({"started_at": "2026-01-05T08:00:00"}, id="no_time_zone"),
        pytest.param({"ended_at": "2026-01-05T08:00:01+00:00"}, id="steps_longer_than_the_run"),
        pytest.param({"sample_counts": {"consumed": -5, "skipped": 5}}, id="negative_samples"),
        pytest.param({"world_size": 0}, id="no_device"),
        pytest.param({"recipe": {"train": [1]}}, id="recipe_of_another_shape"),
        pytest.param({"recipe": {"train": {"train_iters": 2 * 10**9}}}, id="endless_plan"),
    ],
)
@pytest.mark.timeout(20)
def test_damaged_run_info_is_invalid_on_either_side(
    change: dict[str, Any], tmp_path: Path, policy: Policy
) -> None:
    good = load_record(write_synthetic_run(tmp_path / "good", RUN))
    file = write_synthetic_run(tmp_path / "bad", RUN) / RUN_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    bad = load_record(tmp_path / "bad")
    for verdict in (grade(bad, None, policy), compare(bad, good, policy), compare(good, bad, policy)):
        assert verdict.name == "INVALID"


@pytest.mark.parametrize("name", [RUN_FILE, METRICS_FILE])
def test_folder_in_the_place_of_a_file_is_invalid(name: str, tmp_path: Path, policy: Policy) -> None:
    write_synthetic_run(tmp_path / "run", RUN)
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    assert grade(load_record(tmp_path / "run"), None, policy).name == "INVALID"


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff", "null"])
@pytest.mark.parametrize("file", ["grading.json", "verdict.json"])
def test_damaged_file_of_an_earlier_grading_is_named(
    file: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_synthetic_run(tmp_path / "run", RUN) / file).write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")])
    assert stop.value.code == 3
    assert file in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["grade", str(tmp_path / "run"), "--baseline-dir", str(tmp_path / "none")])
    # The verdict is written anew; what case it was of is not known any more.
    assert stop.value.code == (3 if file == "grading.json" else 13)


@pytest.mark.parametrize(
    "verdict",
    [
        '{"name": "PASS"}',
        '{"name": "PASS", "exit_code": 0, "baseline_id": null, "match_level": "none", "notes": [], "gates": ["C0"]}',
        '{"name": "PASS", "exit_code": 0, "baseline_id": null, "match_level": "none", "notes": [], "gates": 5}',
        '{"name": ["PASS"], "exit_code": 0, "baseline_id": null, "match_level": "none", "notes": [], "gates": []}',
        '{"name": "PASS", "exit_code": 0, "baseline_id": null, "match_level": "none", "notes": 1, "gates": []}',
    ],
)
def test_verdict_of_another_shape_is_named(
    verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_synthetic_run(tmp_path / "run", RUN) / "verdict.json").write_text(verdict)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")])
    assert stop.value.code == 3
    assert "of this version" in capsys.readouterr().err
