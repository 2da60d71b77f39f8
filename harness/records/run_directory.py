# SPDX-License-Identifier: Apache-2.0
"""Reader of our own run directories: ``run.json`` and ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from harness.records.machine import read_machine
from harness.records.record import (
    COLUMNS,
    MAX_ITERATION,
    OPTIONAL_COLUMNS,
    TEXT_COLUMNS,
    Rows,
    RunRecord,
    brief,
    to_number,
)
from models.contract.record import METRICS_FILE, RUN_FILE, SCHEMA_VERSION, RunInfo, read_run_info


def is_run_directory(path: Path) -> bool:
    """Whether the folder holds one of the two files."""
    return (path / RUN_FILE).is_file() or (path / METRICS_FILE).is_file()


def read_run_directory(path: Path) -> RunRecord:
    """Read a run directory, killed or complete. Whatever is wrong with it is in `problems`."""
    rows = Rows()
    info, problems = _read_info(path)
    file = path / METRICS_FILE
    if file.is_file():
        text = file.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if line.strip():
                problems += _read_line(line, f"{METRICS_FILE}:{number}", rows)
    else:
        problems.append(f"no_metrics: {METRICS_FILE} is missing: the run ended before its first iteration")
    if file.is_file() and not rows.rows:
        problems.append(f"no_iterations: {METRICS_FILE} holds no iteration")
    train = info.recipe.get("train") if info else None
    planned = train.get("train_iters") if isinstance(train, dict) else None
    return RunRecord(
        series=rows.series(),
        info=info,
        source=str(path),
        framework="qwen_harness",
        problems=brief(problems + rows.order_problems()),
        known=rows.known(),
        machine=read_machine(path),
        planned_iterations=planned if _is_iteration(planned) else None,
    )


def _is_iteration(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_ITERATION


def _read_info(path: Path) -> tuple[RunInfo | None, list[str]]:
    try:
        info = read_run_info(path)
    except FileNotFoundError:
        return None, [f"no_run_info: {RUN_FILE} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return None, [f"no_run_info: {RUN_FILE} cannot be read: {error}"]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        return None, [f"run_info_malformed: {RUN_FILE}: {where}: {first['msg']}"]
    if info.schema_version != SCHEMA_VERSION:
        return None, [
            f"schema_version: {RUN_FILE} has version {info.schema_version}, this harness reads {SCHEMA_VERSION}"
        ]
    return info, []


def _read_line(line: str, place: str, rows: Rows) -> list[str]:
    """Take one line of ``metrics.jsonl``; returns what is wrong with it."""
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return [f"torn_line: {place} is not whole JSON: {line.strip()[:60]!r}"]
    if not isinstance(data, dict):
        return [f"torn_line: {place} is not an object: {line.strip()[:60]!r}"]
    if not line.endswith("\n"):
        return [f"torn_line: {place} has no end of line: the writer was stopped"]
    iteration = data.get("iteration")
    if not _is_iteration(iteration):
        return [f"bad_iteration: {place} has iteration {iteration!r:.40}"]
    row, problems = _numbers(data, place)
    rows.add({"iteration": iteration, **row}, place)
    return problems


def _numbers(data: dict[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    row: dict[str, Any] = {}
    problems: list[str] = []
    extra = data.get("extra", {})
    items = {key: value for key, value in data.items() if key not in {"iteration", "extra"}}
    if isinstance(extra, dict):
        items |= {f"extra.{key}": value for key, value in extra.items()}
    else:
        problems.append(f"not_a_number: {place}: extra is {extra!r:.40}")
    for key, value in items.items():
        if key in TEXT_COLUMNS:
            row[key] = str(value)
        elif key not in COLUMNS and not key.startswith("extra."):
            problems.append(f"unknown_column: {place}: '{key}' is not a column of this version")
        elif value is None and key in OPTIONAL_COLUMNS:
            continue
        elif (number := to_number(value)) is None:
            problems.append(f"not_a_number: {place}: {key} = {value!r:.40}")
        else:
            row[key] = number
    return row, problems
