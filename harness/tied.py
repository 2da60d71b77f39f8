# SPDX-License-Identifier: Apache-2.0
"""Become a command that is asked to stop when its parent dies: ``python tied.py PARENT_PID COMMAND …``.

A launcher that is killed with SIGKILL cannot stop what it started. The kernel can, when the child asked it to; asking
is done here, in a fresh process, because nothing may run between fork and exec of a process with threads.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``; kept over exec."""


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    with contextlib.suppress(AttributeError, OSError):  # prctl is Linux's: elsewhere nothing is tied
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was asked
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
