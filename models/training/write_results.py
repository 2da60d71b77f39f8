# SPDX-License-Identifier: Apache-2.0
"""Where a process that writes a checkpoint leaves what it wrote, for the one that trains.

megatron-core keeps it in a queue that one more process serves: on every rank 300 MB and seconds of starting for a few
kilobytes, and it outlives a training that is killed. Here it is a file without a name, which a forked writer inherits.
"""

import os
import pickle
import queue
import tempfile
import weakref
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_LENGTH_BYTES = 8


class WriteResults:
    """Items put by this process or a fork of it, one at a time, and taken by this one, in order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as this object is
        weakref.finalize(self, self._file.close)
        self._taken = 0
        """Bytes of the items before the next one."""

    def put(self, item: Any) -> None:
        """Add an item."""
        data = pickle.dumps(item)
        record = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        place = os.fstat(self._file.fileno()).st_size
        while record:
            written = os.pwrite(self._file.fileno(), record, place)
            record, place = record[written:], place + written

    def get_nowait(self) -> Any:
        """Take the next item.

        Raises:
            queue.Empty: there is none.
        """
        length = int.from_bytes(os.pread(self._file.fileno(), _LENGTH_BYTES, self._taken), "little")
        start = self._taken + _LENGTH_BYTES
        data = os.pread(self._file.fileno(), length, start)
        if not length or len(data) < length:  # the writer died while it put it
            raise queue.Empty
        self._taken = start + length
        if self._taken == os.fstat(self._file.fileno()).st_size:
            os.ftruncate(self._file.fileno(), 0)
            self._taken = 0
        return pickle.loads(data)


def collect_write_results() -> None:
    """Have megatron-core's checkpoint writers of this process use such a file."""
    filesystem_async._results_queue = WriteResults()  # pyright: ignore[reportAttributeAccessIssue]
