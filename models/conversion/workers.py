# SPDX-License-Identifier: Apache-2.0
"""Work on independent items in several processes that inherit what the caller has open, and that stop together.

Processes and not threads: reading, comparing and writing blocks is so many short calls that two threads mostly wait
for each other's interpreter lock.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_EXCEPTION,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from typing import Any

import torch

Advance = Callable[[int], None]
"""Told the bytes of every block."""
POLL_S = 0.1
PR_SET_PDEATHSIG = 1
_inherited: Callable[[int], None]
"""In a worker process: what to do with an item's index."""


class _Stopped(Exception):  # noqa: N818 - nothing went wrong here
    """Ends an item because another one failed or the caller is ending."""


def for_each[T](
    items: Sequence[T], work: Callable[[T, Advance], None], *, workers: int, advance: Advance
) -> None:
    """Call `work(item, advance)` for every item, in this process if there is one worker or one item.

    An error or Ctrl-C stops all workers at their next `advance`.

    Raises:
        BrokenProcessPool: a worker process died.
        KeyboardInterrupt: Ctrl-C, after the workers stopped.
        Exception: what `work` raised first.
    """
    context = multiprocessing.get_context("fork")
    # A slot for each item, and plain memory: a worker that is killed cannot leave a lock behind.
    done, stop = context.RawArray("q", len(items)), context.RawValue("b", 0)

    def one(index: int) -> None:
        def note(count: int) -> None:
            done[index] += count
            if stop.value:
                raise _Stopped

        try:
            note(0)
            work(items[index], note)
        except BaseException:
            stop.value = 1
            raise

    reported = 0
    gc.freeze()  # or each worker walks, and so copies, everything that the caller's imports left in memory
    with _interrupts(stop) as interrupts:
        # A thread even for one worker: nothing may interrupt torch half-way through a file that it writes.
        pool = (
            ThreadPoolExecutor(1) if workers == 1 or len(items) < 2
            else ProcessPoolExecutor(min(workers, len(items)), context, _start, (one, os.getpid()))
        )  # fmt: skip
        try:
            call = one if isinstance(pool, ThreadPoolExecutor) else _call_inherited
            waiting = _submit(pool, call, len(items))
            while waiting:
                ended, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                total = sum(done)
                advance(total - reported)
                reported = total
                if interrupts:
                    raise KeyboardInterrupt
                for error in (future.exception() for future in ended):
                    if error is not None and not isinstance(error, _Stopped):
                        raise error
        finally:
            stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)
            gc.unfreeze()
        if interrupts:  # at the very end: what is done is kept, but nothing goes on after Ctrl-C
            raise KeyboardInterrupt


def _submit(pool: Executor, call: Callable[[int], None], count: int) -> set[Future[None]]:
    """Hand out all items; the first one forks the workers."""
    with warnings.catch_warnings():
        # The caller has threads (BLAS, a progress bar). Safe here: a worker computes on its one thread, and takes no
        # lock that those could hold.
        warnings.filterwarnings("ignore", r".*multi-threaded, use of fork\(\)", DeprecationWarning)
        return {pool.submit(call, index) for index in range(count)}


@contextlib.contextmanager
def _interrupts(stop: Any) -> Iterator[list[int]]:
    """Collect Ctrl-C and set `stop`, instead of raising anywhere: the pool's locks and joins do not survive that."""
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        stop.value = 1

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    signal.signal(signal.SIGINT, catch)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _start(one: Callable[[int], None], parent: int) -> None:
    """Set a worker process up."""
    global _inherited  # noqa: PLW0603 - a pool gives a forked process what cannot be pickled in no other way
    _inherited = one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller gets it too, and stops the workers
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if (
        prctl is not None
    ):  # Linux: else a worker whose caller is killed would wait, and hold its locks, for ever
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    torch.set_num_threads(1)  # the caller's other threads do not exist here


def _call_inherited(index: int) -> None:
    _inherited(index)
