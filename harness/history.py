# SPDX-License-Identifier: Apache-2.0
"""History of every graded run in one SQLite file, and change points over it."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.baselines.schema import device_name
from harness.baselines.store import hardware_of
from harness.calibration import steady_rows
from models.contract.errors import RunError

if TYPE_CHECKING:
    from harness.policy import Policy
    from harness.records.record import RunRecord
    from harness.verdict import Verdict

SCHEMA_VERSION = 1
METRICS = ("end_lm_loss", "eval_lm_loss", "step_time_ms", "peak_memory_bytes")
MIN_POINTS = 8
_CREATE = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL, started_at TEXT NOT NULL, graded_at TEXT NOT NULL,
    suite TEXT NOT NULL, case_name TEXT NOT NULL, hardware TEXT NOT NULL, device_name TEXT NOT NULL,
    recipe_sha TEXT NOT NULL, git_commit TEXT NOT NULL, verdict TEXT NOT NULL, baseline_id TEXT,
    end_lm_loss REAL, eval_lm_loss REAL, step_time_ms REAL, peak_memory_bytes REAL,
    environment TEXT NOT NULL, gates TEXT NOT NULL,
    UNIQUE (run_id, started_at, graded_at)
);
CREATE INDEX IF NOT EXISTS runs_of_case ON runs (suite, case_name, hardware, started_at);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePoint:
    """A place in the history where a metric moved and stayed."""

    metric: str
    index: int
    """Position of the first run after the change."""
    started_at: str
    git_commit: str
    before: float
    after: float

    @property
    def relative_change(self) -> float:
        """After / before - 1."""
        return self.after / self.before - 1.0


@contextlib.contextmanager
def open_history(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file, made if need be; commits on success.

    Raises:
        RunError: the file is not a history of this version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in {0, SCHEMA_VERSION}:
            raise RunError(
                "the history is of another version",
                where=str(path),
                expected=str(SCHEMA_VERSION),
                got=str(version),
            )
        connection.executescript(_CREATE)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        with connection:
            yield connection
    except sqlite3.DatabaseError as error:
        raise RunError(
            "the history cannot be read", where=str(path), got=str(error), fix="move the file away"
        ) from None
    finally:
        connection.close()


def add_run(
    path: Path, record: RunRecord, verdict: Verdict, policy: Policy, *, suite: str, case: str, graded_at: str
) -> None:
    """Append one graded run. The same run graded at the same time is stored once."""
    info = record.info
    environment = info.environment if info else {}
    row = {
        "run_id": info.run_id if info else record.source,
        "started_at": info.started_at if info else graded_at,
        "graded_at": graded_at,
        "suite": suite,
        "case_name": case,
        "hardware": hardware_of(record) or "unknown",
        "device_name": device_name(record),
        "recipe_sha": info.recipe_sha if info else "",
        "git_commit": str(environment.get("commit", "")),
        "verdict": verdict.name,
        "baseline_id": verdict.baseline_id,
        **_metrics(record, policy),
        "environment": json.dumps(environment, sort_keys=True, default=str),
        "gates": json.dumps([gate.to_dict() for gate in verdict.gates]),
    }
    names = ", ".join(row)
    marks = ", ".join(f":{name}" for name in row)
    with open_history(path) as connection:
        connection.execute(f"INSERT OR IGNORE INTO runs ({names}) VALUES ({marks})", row)


def runs_of_case(path: Path, *, suite: str, case: str, hardware: str) -> list[dict[str, Any]]:
    """All graded runs of a case on a hardware class, oldest first."""
    with open_history(path) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute(
            "SELECT * FROM runs WHERE suite = ? AND case_name = ? AND hardware = ? ORDER BY started_at, id",
            (suite, case, hardware),
        ).fetchall()
    return [dict(row) for row in rows]


def change_points(
    rows: list[dict[str, Any]], metric: str, *, min_relative: float = 0.01
) -> list[ChangePoint]:
    """Where a metric moved and stayed: piecewise-constant fit with a penalty for each piece.

    Fitted on ln(value) by PELT (Killick et al., 2012, through ``ruptures``); the penalty is that of the Bayesian
    information criterion with the noise estimated from differences of neighbours, which steps hardly touch.

    Args:
        rows: As :func:`runs_of_case` returns them.
        metric: One of :data:`METRICS`.
        min_relative: Smaller moves are not reported.

    Returns: Change points, oldest first; none for fewer than eight values.
    """
    import ruptures

    kept = [row for row in rows if row[metric] is not None and row[metric] > 0]
    if len(kept) < MIN_POINTS:
        return []
    values = np.log([row[metric] for row in kept])
    differences = np.diff(values)
    # 1.4826 times the median is the sd of a normal; a difference has twice the variance of a value.
    noise = 1.4826 * float(np.median(np.abs(differences - np.median(differences)))) / np.sqrt(2.0)
    scale = max(noise, min_relative / 4.0)
    penalty = 5.0 * np.log(len(values)) * scale**2
    ends = ruptures.Pelt(model="l2", min_size=2, jump=1).fit(values.reshape(-1, 1)).predict(pen=penalty)
    edges = [0, *ends]
    levels = [float(np.exp(np.median(values[start:end]))) for start, end in zip(edges, ends, strict=False)]
    points = [
        ChangePoint(
            metric=metric,
            index=edge,
            started_at=kept[edge]["started_at"],
            git_commit=kept[edge]["git_commit"],
            before=before,
            after=after,
        )
        for edge, before, after in zip(ends, levels, levels[1:], strict=False)
    ]
    return [point for point in points if abs(point.relative_change) >= min_relative]


def _metrics(record: RunRecord, policy: Policy) -> dict[str, float | None]:
    if record.series.empty:
        return dict.fromkeys(METRICS)
    steady, _ = steady_rows(record.series, policy)
    held_out = record.values("eval_lm_loss")
    held_out = held_out[np.isfinite(held_out)]
    values = {
        "end_lm_loss": record.values("lm_loss")[-policy.end_window.num_iterations :].mean(),
        "eval_lm_loss": held_out[-1] if len(held_out) else math.nan,
        "step_time_ms": np.median(steady["step_time_ms"].to_numpy(dtype=float)) if len(steady) else math.nan,
        "peak_memory_bytes": record.values("peak_memory_bytes").max(),
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
