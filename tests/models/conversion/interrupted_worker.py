# SPDX-License-Identifier: Apache-2.0
"""The real program, stopped by a real signal (or a real limit on file sizes) at a chosen write.

python interrupted_worker.py SIGKILL|SIGINT self|parent|group COUNT ARGUMENTS-OF-CONVERT…
python interrupted_worker.py RLIMIT self BYTES ARGUMENTS-OF-CONVERT…

With several workers each of them counts its own writes; `parent` is then the program, and `self` one of its workers.
"""

import os
import resource
import signal
import sys
import time

from models.conversion import sinks
from models.entry.convert import main

what, whom, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
sinks.FILE_BYTES = 2**17  # many files of a tiny checkpoint
write, calls = sinks._write_checked, []


def stopped(*arguments) -> None:
    calls.append(1)
    if len(calls) == count:
        number = getattr(signal, what)
        if whom == "group":
            for _ in range(3):  # an impatient user: no further Ctrl-C may break the end
                os.killpg(0, number)
                time.sleep(0.03)
        else:
            os.kill(os.getppid() if whom == "parent" else os.getpid(), number)
    write(*arguments)


# As in a terminal, also where the tests were started in the background, which ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
if what == "RLIMIT":
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
else:
    sinks._write_checked = stopped
sys.exit(main(sys.argv[4:]))
