# SPDX-License-Identifier: Apache-2.0
"""Text files that are there whole or not at all."""

import os
from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, text: str, *, is_shared: bool = False) -> None:
    """Replace a file: whoever reads it, a full disk and a kill leave the old one or find the new one.

    Args:
        path: In a folder that exists.
        text: Written in UTF-8.
        is_shared: Whether other processes may write the same file meanwhile; the last one's stays.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial" if is_shared else f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
