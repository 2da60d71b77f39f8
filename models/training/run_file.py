# SPDX-License-Identifier: Apache-2.0
"""``run.json`` over the life of a run, and the claim on its directory."""

import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from models.contract.errors import ConfigError, HarnessError
from models.contract.recipe import Recipe
from models.contract.record import (
    METRICS_FILE,
    RUN_FILE,
    RunInfo,
    iter_metrics,
    read_run_info,
    to_json_number,
    write_run_info,
)

logger = logging.getLogger(__name__)

FAILURES = "failures"
"""Folder with one file for each rank that failed."""


def utc_now() -> str:
    """ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def require_free(directory: Path, *, is_resume: bool) -> None:
    """Check that a run may begin in the directory, or go on there.

    Raises:
        ConfigError: the directory already holds a run and `is_resume` is false.
    """
    if (directory / RUN_FILE).exists() and not is_resume:
        raise ConfigError(
            "the run directory already holds a run",
            where=str(directory),
            expected="a new or empty folder",
            fix="choose another --run-dir, or pass --resume to go on from its last checkpoint",
        )


def claim_directory(directory: Path, recipe: Recipe, *, world_size: int, is_resume: bool) -> RunInfo:
    """Make the run directory this run's own and write its first ``run.json``.

    Raises:
        ConfigError: the directory already holds a run and `is_resume` is false.
    """
    require_free(directory, is_resume=is_resume)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / FAILURES, ignore_errors=True)  # of the attempt before
    for half_written in directory.glob(f"{RUN_FILE}.*.partial"):  # by a rank that was killed
        half_written.unlink(missing_ok=True)
    info = RunInfo(
        run_id=f"{recipe.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}",
        recipe=recipe.model_dump(mode="json"),
        recipe_sha=recipe.sha(),
        family=recipe.model.family,
        command=[sys.executable, *sys.argv],
        started_at=utc_now(),
        world_size=world_size,
    )
    write_run_info(directory, info)
    return info


@contextmanager
def failures_recorded(directory: Path, rank: int) -> Iterator[None]:
    """Write an error that leaves the block into ``run.json`` as the run's outcome, and let it pass on."""
    try:
        yield
    except BaseException as error:
        record_failure(directory, rank, error)
        raise


def record_failure(directory: Path, rank: int, error: BaseException) -> None:
    """Set the outcome to failed, with the error of the rank that failed first: the others' are its echo.

    Every rank leaves its own error in ``failures/`` before the others can notice that it is gone, so whoever writes
    ``run.json`` last knows all that came before.
    """
    if not (directory / RUN_FILE).exists():
        return
    own = directory / FAILURES / f"rank_{rank:05d}.json"
    if not own.exists():
        own.parent.mkdir(exist_ok=True)
        facts = {"at": time.time(), "rank": rank, "error": _words(error)}
        partial = own.with_suffix(".partial")
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(own)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in own.parent.glob("rank_*.json")]
    first = min(found, key=lambda failure: failure["at"])
    info = read_run_info(directory)
    if info.outcome.status in ("completed", "interrupted"):
        return
    info.outcome.status = "failed"
    info.outcome.error = f"rank {first['rank']}: {first['error']}"
    info.ended_at = utc_now()
    write_run_info(directory, info)


def _words(error: BaseException) -> str:
    """An error of ours in its own text, any other with its traceback."""
    if isinstance(error, HarnessError):
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "".join(traceback.format_exception(error))


def cut_metrics(
    directory: Path, last_iteration: int, *, is_writer: bool
) -> tuple[dict[int, str], dict[int, str]]:
    """Drop the rows of ``metrics.jsonl`` after `last_iteration`, which a resume is about to repeat.

    Every rank learns the digests; only the writer changes the file.

    Returns: sample digests by iteration of the rows that stay, and of those dropped.
    """
    kept: dict[int, str] = {}
    dropped: dict[int, str] = {}
    lines = []
    for row in iter_metrics(directory):
        keep = row["iteration"] <= last_iteration
        (kept if keep else dropped)[row["iteration"]] = row["sample_digest"]
        if keep:
            lines.append(json.dumps(to_json_number(row), ensure_ascii=False) + "\n")
    if not is_writer:
        return kept, dropped
    partial = directory / (METRICS_FILE + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(directory / METRICS_FILE)
    return kept, dropped
