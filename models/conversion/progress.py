# SPDX-License-Identifier: Apache-2.0
"""A progress bar in bytes with rate and time left; one line in ten seconds where there is no terminal."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

logger = logging.getLogger(__name__)
LINE_INTERVAL_S = 10.0


@dataclass(slots=True)
class ByteLog:
    """Progress without a terminal."""

    title: str
    total: int = 0
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, total: int) -> None:
        """Set the bytes of the whole work."""
        self.total = total

    def advance(self, count: int) -> None:
        """Count bytes; log now and then."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self.last < LINE_INTERVAL_S:
                return
            self.last, rate = now, self.done / (now - self.started)
            left = (self.total - self.done) / max(rate, 1.0)
        logger.info(
            "%s: %.2f of %.2f GB, %.0f MB/s, %.0f s left",
            self.title,
            self.done / 1e9,
            self.total / 1e9,
            rate / 1e6,
            left,
        )


@contextlib.contextmanager
def byte_progress(title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Yields `start(total)` and `advance(count)`, both in bytes; `advance` may be called from several threads."""
    if not sys.stderr.isatty():
        log = ByteLog(title)
        yield log.start, log.advance
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=False), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)
        yield (
            lambda total: progress.update(task, total=total),
            lambda count: progress.update(task, advance=count),
        )
