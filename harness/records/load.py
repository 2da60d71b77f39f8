# SPDX-License-Identifier: Apache-2.0
"""Finds out what a path is and reads it."""

from pathlib import Path

from harness.records.record import RunRecord
from harness.records.run_directory import is_run_directory, read_run_directory
from harness.records.tensorboard import event_files, read_tensorboard
from harness.records.text_log import read_text_log
from models.contract.errors import RunError
from models.contract.record import METRICS_FILE, RUN_FILE


def load_record(path: Path | str) -> RunRecord:
    """Read a run directory, a text log, or TensorBoard event files (a file or a folder of them).

    Raises:
        RunError: the path is not there or cannot be read, or a folder holds nothing that can be read as a run.
    """
    path = Path(path)
    if not path.exists():
        raise RunError("no such run or log", where=str(path), fix="check the path")
    if path.is_file() and path.name in {RUN_FILE, METRICS_FILE}:
        path = path.parent
    try:
        return _read(path)
    except OSError as error:
        raise RunError(
            "the source cannot be read", where=str(path), got=str(error), fix="check its rights"
        ) from None


def _read(path: Path) -> RunRecord:
    if path.is_dir() and is_run_directory(path):
        return read_run_directory(path)
    if event_files(path):
        return read_tensorboard(path)
    if path.is_file():
        return read_text_log(path)
    raise RunError(
        "the folder holds no run",
        where=str(path),
        expected=f"{RUN_FILE} and {METRICS_FILE}, or TensorBoard event files, or name a log file",
        got=", ".join(sorted(item.name for item in path.iterdir())[:8]) or "an empty folder",
    )
