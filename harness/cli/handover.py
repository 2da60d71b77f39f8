# SPDX-License-Identifier: Apache-2.0
"""Hands `convert`, `data` and `generate` to their programs, which may import torch; this process may not."""

import os
import signal
import subprocess
import sys

from harness.hardware import REPOSITORY

PROGRAMS = {
    "convert": "models.entry.convert",
    "data": "models.entry.prepare",
    "generate": "models.entry.generate",
}


def hand_over(verb: str, arguments: list[str]) -> int:
    """Run the program of a verb with the arguments untouched; return its exit code (128 + n for signal n)."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment["QWEN_HARNESS_PROG"] = f"qwen-harness {verb}"  # the name that the program's help shows
    process = subprocess.Popen([sys.executable, "-m", PROGRAMS[verb], *arguments], env=environment)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the terminal sent it to the child too: let it clean up
            continue
    return code if code >= 0 else 128 + signal.Signals(-code).value
