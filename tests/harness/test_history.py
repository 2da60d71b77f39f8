# SPDX-License-Identifier: Apache-2.0
import random
from pathlib import Path
from typing import Any

import pytest

from harness.grading import grade
from harness.history import add_run, change_points, open_history, runs_of_case
from harness.policy import Policy
from harness.records import RunRecord
from models.contract.errors import RunError


def rows(levels: list[float], noise: float, seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"started_at": f"day {n}", "git_commit": f"c{n}", "step_time_ms": level * (1 + rng.gauss(0, noise))}
        for n, level in enumerate(levels)
    ]


def test_graded_run_is_kept_once(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    verdict = grade(launches[0], None, policy)
    for graded_at in ("2026-01-05T09:00:00", "2026-01-05T09:00:00", "2026-01-05T10:00:00"):
        add_run(path, launches[0], verdict, policy, suite="convergence", case="tiny", graded_at=graded_at)
    found = runs_of_case(path, suite="convergence", case="tiny", hardware="cpu")
    assert [row["graded_at"] for row in found] == ["2026-01-05T09:00:00", "2026-01-05T10:00:00"]
    assert (found[0]["verdict"], found[0]["git_commit"]) == ("NO_BASELINE", "0123abcd")
    assert found[0]["end_lm_loss"] == pytest.approx(launches[0].series["lm_loss"].tail(50).mean())
    assert found[0]["eval_lm_loss"] == launches[0].series["eval_lm_loss"].iloc[-1]
    assert runs_of_case(path, suite="convergence", case="tiny", hardware="h100") == []


@pytest.mark.parametrize(
    "text", [b"not a database at all, and long enough to be one" * 10, b"SQLite format 3\x00junk"]
)
def test_foreign_file_is_named(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.write_bytes(text)
    with pytest.raises(RunError, match="cannot be read"), open_history(path):
        pass


def test_other_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with open_history(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(RunError, match="another version"), open_history(path):
        pass


def test_step_in_the_history_is_found_where_it_is() -> None:
    (point,) = change_points(rows([100.0] * 12 + [104.0] * 12, noise=0.003), "step_time_ms")
    assert (point.index, point.git_commit) == (12, "c12")
    assert point.relative_change == pytest.approx(0.04, abs=0.004)


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02])
def test_quiet_history_has_no_change_points(noise: float) -> None:
    found = [change_points(rows([100.0] * 30, noise=noise, seed=seed), "step_time_ms") for seed in range(20)]
    assert sum(map(len, found)) <= 1


def test_short_history_and_missing_values_say_nothing() -> None:
    assert change_points(rows([100.0] * 3 + [120.0] * 3, noise=0.001), "step_time_ms") == []
    empty = [{**row, "step_time_ms": None} for row in rows([100.0] * 20, noise=0.001)]
    assert change_points(empty, "step_time_ms") == []
