# SPDX-License-Identifier: Apache-2.0
"""Write a folder of large files so that it appears whole or not at all, and can go on after a kill.

target                 appears by a rename, when every file was written, read back and compared
.target.partial/       next to it, while the work goes on
  plan.json            what is being written, from what; another plan is refused
  journal/FILE.json    one entry for each finished file
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.contract.errors import ConfigError, HarnessError, RunError
from models.contract.whole_file import write_whole
from models.conversion.workers import Advance, for_each

PLAN_FILE = "plan.json"
PLAN_FORMAT = 2
"""Of the journal's entries: what another version left half-done is not continued."""
JOURNAL = "journal"
SPACE_MARGIN = 64 * 2**20
"""Bytes asked for beyond the tensors: headers, metadata, copied files."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the result."""

    path: str
    """Relative to the target."""
    spans: tuple[Span, ...]
    num_bytes: int


Entries = dict[str, dict[str, Any]]
"""Journal entries by path of the file."""
WriteFile = Callable[[OutputFile, Path, Advance], dict[str, Any]]
"""`write(file, path, advance)` writes one file and returns its journal entry. Called in several processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A folder to be written."""

    target: Path
    files: tuple[OutputFile, ...]
    identity: dict[str, Any]
    """What the result depends on, JSON-able; a partial folder made from something else is not continued."""

    @property
    def partial(self) -> Path:
        """Where the work goes on."""
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def finished(job: Job) -> Entries:
    """Journal entries of the files that are already there."""
    entries = {}
    for file in job.files:
        entry = job.partial / JOURNAL / f"{file.path.replace('/', '.')}.json"
        path = job.partial / file.path
        if entry.is_file() and path.is_file():
            data = json.loads(entry.read_text(encoding="utf-8"))
            if data["size"] == path.stat().st_size:
                entries[file.path] = data
    return entries


def check_target(job: Job, *, restart: bool) -> None:
    """Everything that can be refused before the first byte is written.

    Raises:
        ConfigError: the result exists, the folder cannot be written, the disk is too small, or a partial result
            was made from something else.
    """
    if _is_taken(job.target):
        raise ConfigError(
            "the target exists",
            where=str(job.target),
            fix="choose another folder, or remove it: nothing is overwritten",
        )
    parent = job.target.absolute().parent
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            "the target cannot be written", where=str(existing), fix="choose a folder you may write to"
        )
    plan = job.partial / PLAN_FILE
    if not restart and plan.is_file() and _read_plan(plan) != _plan(job):
        raise ConfigError(
            "a partial result of another conversion is in the way", where=str(job.partial),
            fix="pass --restart to throw it away, or choose another target",
        )  # fmt: skip
    done = {} if restart or not plan.is_file() else finished(job)
    needed = sum(file.num_bytes for file in job.files if file.path not in done) + SPACE_MARGIN
    free = shutil.disk_usage(existing).free + (_size(job.partial) if restart else 0)
    if needed > free:
        raise ConfigError(
            "not enough disk space",
            where=str(existing),
            expected=f"{needed / 2**30:.2f} GiB",
            got=f"{free / 2**30:.2f} GiB free",
            fix="free space or choose another disk",
        )


def run_job(
    job: Job,
    write: WriteFile,
    finish: Callable[[Path, Entries], None],
    *,
    workers: int,
    share: tuple[int, int] = (0, 1),
    restart: bool = False,
    advance: Advance = lambda _: None,
) -> tuple[bool, Entries]:
    """Write every file that is missing, then finish and rename.

    Args:
        job: What to write.
        write: Writes one file.
        finish: Writes what remains (metadata, copied files) into the partial folder, given all journal entries.
        workers: Processes.
        share: `(k, n)`: this process writes every n-th file from the k-th on; whoever sees all of them finishes.
        restart: Throw a partial result away.
        advance: Told how many bytes were already there, then those of every block.

    Returns: Whether the result is complete (False if files of other shares are still missing), and the journal
        entries of the files that are there.

    Raises:
        ConfigError: as :func:`check_target`.
        RunError: the disk is full or fails, or a worker died; what was written stays for the next attempt.
    """
    check_target(job, restart=restart)
    with _reported(job):
        if restart:
            shutil.rmtree(job.partial, ignore_errors=True)
        (job.partial / JOURNAL).mkdir(parents=True, exist_ok=True)
        with _locked(job.partial / f"lock-{share[0]}"):
            write_whole(job.partial / PLAN_FILE, json.dumps(_plan(job)))
            done = finished(job)
            advance(sum(file.num_bytes for file in job.files if file.path in done))
            mine = [
                file
                for index, file in enumerate(job.files)
                if index % share[1] == share[0] and file.path not in done
            ]
            # The largest first, so that no worker is left alone with a large one at the end.
            mine.sort(key=lambda file: file.num_bytes, reverse=True)
            for_each(
                mine,
                lambda file, advance: _write_one(job, file, write, advance),
                workers=workers,
                advance=advance,
            )
            entries = finished(job)
            return _finish(job, finish, entries), entries


def _write_one(job: Job, file: OutputFile, write: WriteFile, advance: Advance) -> None:
    path = job.partial / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    entry = write(file, unfinished, advance)
    entry["size"] = unfinished.stat().st_size
    unfinished.replace(path)
    write_whole(job.partial / JOURNAL / f"{file.path.replace('/', '.')}.json", json.dumps(entry))


def _finish(job: Job, finish: Callable[[Path, Entries], None], entries: Entries) -> bool:
    if len(entries) < len(job.files):
        return False
    with _locked(job.partial / "lock-finish"):
        if _is_taken(job.target) or not job.partial.exists():
            return True  # another share was faster
        finish(job.partial, entries)
        shutil.rmtree(job.partial / JOURNAL)
        for leftover in (*job.partial.glob("lock-*"), job.partial / PLAN_FILE):
            leftover.unlink()
        job.partial.rename(job.target)
    return True


def _is_taken(target: Path) -> bool:
    """Whether something is there that could be lost; an empty folder is not."""
    if target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return target.exists() or target.is_symlink()


def _plan(job: Job) -> dict[str, Any]:
    files = [
        [file.path, [[s.name, s.start, s.stop] for s in file.spans], file.num_bytes] for file in job.files
    ]
    return json.loads(json.dumps({"format": PLAN_FORMAT, "identity": job.identity, "files": files}))


def _read_plan(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process dies."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "another process is writing this result",
                where=str(file.parent),
                fix="wait for it, or stop it",
            ) from None
        yield


@contextlib.contextmanager
def _reported(job: Job) -> Iterator[None]:
    try:
        yield
    except HarnessError:
        raise
    except BrokenProcessPool:
        raise RunError(
            "a worker process died", where=str(job.partial),
            got="it was killed, as the system does when memory runs out",
            fix="start the same command again, with fewer --workers if memory is short: finished files are kept",
        ) from None  # fmt: skip
    except OSError as error:
        what = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}.get(
            error.errno or 0
        )
        raise RunError(
            what or "the result could not be written", where=str(job.partial), got=str(error),
            fix="start again after repair: finished files are kept and not written twice",
        ) from error  # fmt: skip


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
