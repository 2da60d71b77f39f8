# SPDX-License-Identifier: Apache-2.0
"""The real program, stopped by a real signal (or a real limit on file sizes) at a chosen write.

python interrupted_worker.py SIGKILL|SIGINT|RLIMIT COUNT ARGUMENTS-OF-CONVERT…
"""

import os
import resource
import signal
import sys

from models.conversion import sinks
from models.entry.convert import main

what, count = sys.argv[1], int(sys.argv[2])
sinks.FILE_BYTES = 2**17  # many files of a tiny checkpoint
write, calls = sinks._write_checked, []


def stopped(*arguments) -> None:
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), getattr(signal, what))
    write(*arguments)


if what == "RLIMIT":
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
else:
    sinks._write_checked = stopped
sys.exit(main(sys.argv[3:]))
