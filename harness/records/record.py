# SPDX-License-Identifier: Apache-2.0
"""The one shape every source is read into."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from harness.records.machine import MachineFacts
from models.contract.record import RunInfo, StepMetrics

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

REPORTED_TFLOPS = "reported_tflops_per_gpu"
REPORTED_TOKENS = "reported_tokens_per_second_per_gpu"
TIMESTAMP = "timestamp_s"
TEXT_COLUMNS = ("sample_digest",)
NUMBER_COLUMNS = tuple(
    name for name in StepMetrics.model_fields if name not in {"iteration", "extra", *TEXT_COLUMNS}
)
"""Columns every series has; those that the source does not tell are NaN and not in `known`."""
COLUMNS = frozenset(StepMetrics.model_fields)
"""Every column of a step, as a set: pydantic's table is slow to ask once a number."""
OPTIONAL_COLUMNS = frozenset(
    name for name, item in StepMetrics.model_fields.items() if type(None) in get_args(item.annotation)
)
"""Step columns that may be null."""
FOREIGN_COLUMNS = (REPORTED_TFLOPS, REPORTED_TOKENS, TIMESTAMP)
"""Columns that only other stacks' logs have."""
MAX_PROBLEMS_A_KIND = 3
MAX_ITERATION = 10**9
"""A larger number in the place of an iteration is damage, not a count."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as far as its source tells.

    `series` is indexed by iteration, ascending and unique: of an iteration that was logged twice the last is kept, and
    `problems` says so. Each problem reads ``code: text``; a record with problems never passes.
    """

    series: pd.DataFrame
    info: RunInfo | None
    source: str
    framework: str
    """qwen_harness, megatron_lm, mindspeed_mm, megatron_bridge, tensorboard or unknown."""
    problems: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    """Columns that the source has values for."""
    planned_iterations: int | None = None
    log_interval: int = 1
    """Iterations between two rows of the source."""
    notes: tuple[str, ...] = ()
    """What a reader should know and what is not wrong."""
    machine: MachineFacts = field(default_factory=MachineFacts)
    """What the launcher saw of the devices; empty for a foreign log."""
    declared: dict[str, Any] = field(default_factory=dict)
    """Facts a foreign source states about the whole run: world_size, seq_length."""

    def has(self, column: str) -> bool:
        """Whether the source tells this column."""
        return column in self.known

    def values(self, column: str) -> np.ndarray:
        """One column as float64, in iteration order."""
        return self.series[column].to_numpy(dtype=float)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty for a foreign log."""
        return self.info.recipe if self.info else {}

    @property
    def world_size(self) -> int | None:
        """Number of devices, if the source tells it."""
        return self.info.world_size if self.info else self.declared.get("world_size")

    @property
    def is_run_directory(self) -> bool:
        """Whether this is one of our own run directories."""
        return self.framework == "qwen_harness"


class Rows:
    """Collects rows in the order they were logged and turns them into a series."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.places: list[str] = []
        self.problems: list[str] = []

    def add(self, row: dict[str, Any], place: str) -> None:
        """Take one row; `place` says where it stood."""
        self.rows.append(row)
        self.places.append(place)

    def order_problems(self) -> list[str]:
        """Iterations that appear twice, or that run backwards (a restart, or ranks interleaved)."""
        found, previous = [], None
        counts = Counter(row["iteration"] for row in self.rows)
        for iteration, count in counts.items():
            if count > 1:
                found.append(f"duplicate_iteration: iteration {iteration} is there {count} times")
        for row, place in zip(self.rows, self.places, strict=True):
            if previous is not None and row["iteration"] < previous:
                found.append(
                    f"rewound: iteration {row['iteration']} follows {previous} at {place} "
                    "(a restart, or the logs of several ranks in one file)"
                )
            previous = row["iteration"]
        return found

    def series(self) -> pd.DataFrame:
        """Rows by iteration, ascending; of a duplicate the last is kept. All number columns are there."""
        import pandas as pd

        last = {row["iteration"]: row for row in self.rows}
        ordered = [last[iteration] for iteration in sorted(last)]
        index = pd.Index([row["iteration"] for row in ordered], dtype="int64", name="iteration")
        extras = sorted(
            {key for row in ordered for key in row} - {"iteration", *NUMBER_COLUMNS, *TEXT_COLUMNS}
        )
        columns: dict[str, list[Any]] = {
            name: [row.get(name, math.nan) for row in ordered] for name in (*NUMBER_COLUMNS, *extras)
        }
        columns |= {name: [row.get(name, "") for row in ordered] for name in TEXT_COLUMNS}
        frame = pd.DataFrame(columns, index=index)
        numbers = [name for name in frame.columns if name not in TEXT_COLUMNS]
        return frame.astype(dict.fromkeys(numbers, "float64"))

    def known(self) -> frozenset[str]:
        """Columns that some row has."""
        return frozenset(key for row in self.rows for key in row if row[key] is not None) - {"iteration"}


def brief(problems: Iterable[str]) -> tuple[str, ...]:
    """At most three problems of a kind, and how many more there were."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.split(":", 1)[0], []).append(problem)
    short: list[str] = []
    for code, texts in kinds.items():
        short += texts[:MAX_PROBLEMS_A_KIND]
        if len(texts) > MAX_PROBLEMS_A_KIND:
            short.append(f"{code}: and {len(texts) - MAX_PROBLEMS_A_KIND} more like it")
    return tuple(short)


def to_number(value: Any) -> float | None:
    """A JSON number, or one of the strings nan, inf, -inf, as a float; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str) and value.strip().lower().lstrip("+-") in {"nan", "inf", "infinity"}:
        return float(value)
    return None
