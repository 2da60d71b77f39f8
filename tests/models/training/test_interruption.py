# SPDX-License-Identifier: Apache-2.0
"""Signals and the watchdog."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.training.interruption import HANG_EXIT_CODE, StopRequest, signals_held, stop_requests

REPOSITORY = Path(__file__).parents[3]


def test_stop_requests_remember_a_signal_and_put_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigint_does_not_wait() -> None:
    request = StopRequest()
    request.handle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        request.handle(signal.SIGINT, None)


def test_watchdog_writes_stacks_and_ends_a_hung_process(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from models.training import interruption
interruption.GRACE_S = 0.1
def stuck_in_a_collective():
    threading.Event().wait()
with interruption.Watchdog(Path(sys.argv[1]), 3, 0.2, lambda message: print(message)):
    stuck_in_a_collective()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == HANG_EXIT_CODE, done.stderr
    assert "no progress for" in done.stdout
    assert "stuck_in_a_collective" in (tmp_path / "rank_00003.txt").read_text()


def test_signals_held_arrive_here_and_never_in_what_was_started_meanwhile() -> None:
    echo = "import sys; sys.stdout.write(sys.stdin.read())"
    with stop_requests() as request:
        with signals_held():
            child = subprocess.Popen(
                [sys.executable, "-c", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5  # another thread may take it: the handler then runs a moment later
        while request.signal_name is None and time.monotonic() < deadline:
            time.sleep(0.01)
        name = request.signal_name
    child.terminate()
    said = child.communicate("still here")[0]
    assert name == "SIGTERM"
    assert said == "still here"
    assert child.returncode == 0


def test_signals_are_held_back_from_a_manager_that_the_first_save_starts(tmp_path: Path) -> None:
    program = (
        tmp_path / "program.py"
    )  # a process of its own: in this one multiprocessing may have begun before
    program.write_text("""
import multiprocessing, os, signal
from models.training.interruption import signals_held
if __name__ == "__main__":
    with signals_held():
        manager = multiprocessing.get_context("spawn").Manager()
        queue = manager.Queue()
    os.kill(manager._process.pid, signal.SIGTERM)
    queue.put("written")
    print(queue.get())
""")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == "written\n", done.stderr
