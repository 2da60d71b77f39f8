# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run early, and a watchdog for one that no longer moves."""

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Self

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 75
GRACE_S = 5.0
"""Seconds between the stack traces and the end, so that every rank's traces are written."""


class StopRequest:
    """Set by SIGINT or SIGTERM: the loop finishes its step, saves and leaves. A second SIGINT raises at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Remember the signal."""
        if self.signal_name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        logger.warning("%s received: finishing this step", self.signal_name)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back from what this thread starts while the block runs, and for good.

    Cluster schedulers signal every process of a job at once: what writes a checkpoint in the background must not die
    of that while the ranks wait for it. This process learns of the signal after the block, or at once where another
    of its threads takes it; either way the handler only takes note.
    """
    resource_tracker.ensure_running()  # it lifts the mask of the thread that starts it: later would undo the next line
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watchdog:
    """Writes the stacks of all threads and ends the process when `beat` stays away too long.

    Every rank has one. In a hang all ranks wait for each other, so each writes its own traces, after the same time.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float, on_hang: Callable[[str], None]) -> None:
        self.timeout_s = timeout_s
        self.path = folder / f"rank_{rank:05d}.txt"
        self._on_hang = on_hang
        self._last_beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    def beat(self) -> None:
        """Say that the run moves."""
        self._last_beat = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout_s / 4)):
            silent_s = time.monotonic() - self._last_beat
            if silent_s > self.timeout_s:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("w", encoding="utf-8") as stream:
                    faulthandler.dump_traceback(file=stream, all_threads=True)
                message = f"no progress for {silent_s:.0f} s; stack traces are in {self.path.parent}"
                self._on_hang(message)
                self._stop.wait(GRACE_S)
                self._on_hang(message)  # a main thread that is only slow may have written since
                os._exit(HANG_EXIT_CODE)
