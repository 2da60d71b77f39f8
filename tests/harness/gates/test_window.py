# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.gates.window import parse_window, rows_of_window, window_text
from harness.grading import compare
from harness.policy import load_policy
from harness.records import load_record
from models.contract.errors import ConfigError
from suites.detection.synthetic import Row, SyntheticRun, write_synthetic_run


@pytest.mark.parametrize(
    ("text", "window"), [("451:500", (451, 500)), ("1:10", (1, 10)), ("50", (-50, -1)), ("10", (-10, -1))]
)
def test_window_is_read(text: str, window: tuple[int, int]) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize(
    "text", ["", "0", "9", "-50", "500:451", "451:459", "0:50", "451-500", "a:b", "451:", "5e1"]
)
def test_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_window(text)
    assert (refused.value.what, refused.value.got) == ("not a window", text)
    assert refused.value.expected == "FIRST:LAST or a length, at least 10 iterations"
    assert refused.value.fix == "for example 451:500, or 50"


def test_window_is_said_as_it_was_asked_for() -> None:
    assert window_text(None) == "at the end"
    assert window_text((451, 500)) == "451:500"
    assert window_text((-50, -1)) == "of its last 50 iterations"
    assert window_text((0, 10)) == "0:10"


def test_rows_need_both_ends() -> None:
    index = pd.Index(range(1, 101))
    assert rows_of_window(index, (51, 100)) == slice(50, 100)
    assert rows_of_window(index, (1, 10)) == slice(0, 10)
    assert rows_of_window(index, (-100, -1)) == slice(0, 100)
    assert rows_of_window(index, (-101, -1)) is None
    assert rows_of_window(index, (91, 101)) is None
    assert rows_of_window(index, (0, 10)) is None
    assert rows_of_window(pd.Index([10, 20, 30]), (10, 30)) == slice(0, 3)


def spoiled(rows: list[Row]) -> list[Row]:
    """Eight per cent more loss from iteration 201 to 260."""
    return [
        row | {"lm_loss": row["lm_loss"] * 1.08} if 201 <= row["iteration"] <= 260 else row for row in rows
    ]


@pytest.mark.parametrize(
    ("window", "status", "found"),
    [
        (None, "pass", [451, 500]),
        ((201, 260), "fail", [201, 260]),
        ((261, 320), "pass", [261, 320]),
        ((-300, -1), "pass", [201, 500]),
        ((451, 501), "inconclusive", None),
        ((-501, -1), "inconclusive", None),
    ],
)
def test_end_window_is_where_it_was_asked_for(
    window: tuple[int, int] | None, status: str, found: list[int] | None, tmp_path: Path
) -> None:
    good = load_record(write_synthetic_run(tmp_path / "a", SyntheticRun(run_seed=1)))
    bad = load_record(write_synthetic_run(tmp_path / "b", SyntheticRun(run_seed=2), change_rows=spoiled))
    gate = compare(bad, good, load_policy(), window=window).gate("C3")
    assert gate is not None
    assert (gate.status, gate.details.get("window")) == (status, found)
    if window == (201, 260):
        assert gate.effect == pytest.approx(0.08, abs=0.005)
    if window == (-300, -1):
        assert gate.effect == pytest.approx(math.expm1(math.log(1.08) * 60 / 300), abs=0.005)


def test_command_line_takes_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic_run(tmp_path / "a", SyntheticRun(run_seed=1))
    write_synthetic_run(tmp_path / "b", SyntheticRun(run_seed=2), change_rows=spoiled)
    runs = [str(tmp_path / "b"), str(tmp_path / "a")]
    for window, code in (("201:260", 10), ("300:400", 0), ("490:501", 12), ("5", 3)):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *runs, "--window", window])
        printed = capsys.readouterr()
        assert stop.value.code == code, printed
        assert "Traceback" not in printed.err
