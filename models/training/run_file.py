# SPDX-License-Identifier: Apache-2.0
"""``run.json`` over the life of a run, and the claim on its directory."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from models.contract.errors import ConfigError, HarnessError, RunError
from models.contract.recipe import Recipe
from models.contract.record import (
    LOCK_FILE,
    METRICS_FILE,
    RUN_FILE,
    RunInfo,
    RunOutcome,
    iter_metrics,
    load_metrics,
    read_run_info,
    to_json_number,
    write_run_info,
)
from models.contract.whole_file import write_whole

logger = logging.getLogger(__name__)

FAILURES = "failures"
"""Folder with one file for each rank that failed."""


@contextmanager
def written(directory: Path) -> Iterator[None]:
    """Word what keeps the block from writing into a run directory.

    Raises:
        RunError: the disk is full, or the like.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            "the run directory cannot be written", where=str(error.filename or directory),
            got=f"{error.strerror or error}; {free_space(directory)}",
            fix="free disk space and go on with --resume; the checkpoints are as they were",
        ) from error  # fmt: skip


def free_space(folder: Path) -> str:
    """How much of a disk is free, for messages."""
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"


def utc_now() -> str:
    """ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def require_free(directory: Path, *, is_resume: bool) -> None:
    """Check that a run may begin in the directory, or go on there.

    Raises:
        ConfigError: the directory already holds a run and `is_resume` is false, or it is none.
    """
    if (directory / RUN_FILE).exists() and not is_resume:
        raise ConfigError(
            "the run directory already holds a run",
            where=str(directory),
            expected="a new or empty folder",
            fix="choose another --run-dir, or pass --resume to go on from its last checkpoint",
        )
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(
            "the run directory cannot be made", where=str(directory), expected="a new or empty folder",
            got=f"{there} is a file", fix="choose another --run-dir",
        )  # fmt: skip


@contextmanager
def directory_held(directory: Path) -> Iterator[None]:
    """Keep other processes from training in a directory while the block runs; one that is killed lets go of it.

    Raises:
        RunError: another process holds it.
    """
    with written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / LOCK_FILE).open("a+", encoding="utf-8")
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock: no child inherits it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                stream.seek(0)
                raise RunError(
                    "another process trains in this directory", where=str(directory), got=stream.read(200).strip(),
                    fix="wait until it has ended, or end it; then --resume goes on from its last checkpoint",
                ) from None  # fmt: skip
            logger.info("%s cannot be locked: %s", directory, error)  # not every network disk can
        else:
            with contextlib.suppress(OSError):  # a full disk keeps the name out, and not the lock
                stream.truncate(0)
                stream.write(f"process {os.getpid()} of {socket.gethostname()} since {utc_now()}\n")
                stream.flush()
        yield


def claim_directory(directory: Path, recipe: Recipe, *, world_size: int, is_resume: bool) -> RunInfo:
    """Make the run directory this run's own and write its first ``run.json``.

    What a run before it said stays until the checkpoint has proved to be of this recipe.

    Returns: what is to be written then.

    Raises:
        ConfigError: see :func:`require_free`.
        RunError: the directory cannot be written.
    """
    require_free(directory, is_resume=is_resume)
    info = RunInfo(
        run_id=f"{recipe.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}",
        recipe=recipe.model_dump(mode="json"),
        recipe_sha=recipe.sha(),
        family=recipe.model.family,
        command=[sys.executable, *sys.argv],
        started_at=utc_now(),
        world_size=world_size,
    )
    with written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        before = _run_before(directory)
        if before is None:
            write_run_info(directory, info)
        elif before.outcome.status != "completed":
            before.started_at, before.ended_at, before.outcome = info.started_at, None, RunOutcome()
            write_run_info(directory, before)
    return info


def _sweep(directory: Path) -> None:
    """Remove what the attempt before left."""
    shutil.rmtree(directory / FAILURES, ignore_errors=True)
    for half_written in directory.glob(f"{RUN_FILE}.*.partial"):  # by a rank that was killed
        half_written.unlink(missing_ok=True)


def _run_before(directory: Path) -> RunInfo | None:
    """What ``run.json`` says of the run that is to go on; None where there is none, or none that can be read."""
    try:
        return read_run_info(directory)
    except FileNotFoundError:
        return None
    except ValueError:
        logger.warning("%s cannot be read and is written anew", directory / RUN_FILE)
        return None


@contextmanager
def failures_recorded(directory: Path, rank: int) -> Iterator[None]:
    """Write an error that leaves the block into ``run.json`` as the run's outcome, and let it pass on."""
    try:
        yield
    except BaseException as error:
        try:
            record_failure(directory, rank, error)
        except OSError as full:  # the error itself says more
            logger.warning("the failure cannot be written to %s: %s", directory / RUN_FILE, full)
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
        write_whole(own, json.dumps(facts, indent=1) + "\n")
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


def recorded_digests(directory: Path) -> dict[int, str]:
    """Sample digest of every iteration in ``metrics.jsonl``.

    Raises:
        RunError: a line cannot be read.
    """
    rows = load_metrics(directory, ["sample_digest"])
    return {iteration: row["sample_digest"] for iteration, row in rows.items()}


def cut_metrics(directory: Path, last_iteration: int) -> None:
    """Drop the rows of ``metrics.jsonl`` after `last_iteration`, which a resume is about to repeat.

    Raises:
        RunError: the file cannot be written; it is as it was then.
    """
    partial = directory / (METRICS_FILE + ".partial")
    with written(directory):
        with partial.open("w", encoding="utf-8") as stream:
            for row in iter_metrics(directory):
                if row["iteration"] <= last_iteration:
                    stream.write(json.dumps(to_json_number(row), ensure_ascii=False) + "\n")
        partial.replace(directory / METRICS_FILE)
