# SPDX-License-Identifier: Apache-2.0
"""What a session judges without having run it: a copy among its own runs, so that its report shows it."""

import filecmp
import shutil
from pathlib import Path

from harness.launch import require_new
from models.contract.record import LOCK_FILE, RUN_FILE


def keep_judged(source: Path, run_dir: Path) -> str:
    """Copy what a record is read from: a log, or the files of a run or TensorBoard folder, without what lies below.

    The source stays as it is. One that is the folder itself is not copied; an earlier copy of it is replaced.

    Args:
        source: What was judged, as its record names it: the folder of a run, whichever of its files was given.
        run_dir: Where the case's run would be.

    Returns: What to read in `run_dir`: a file's name, or `.` for the folder.

    Raises:
        RunError: another run is there already.
    """
    if source.resolve() == run_dir.resolve():
        return "."
    if not _is_same_run(source, run_dir):
        require_new(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    files = [source] if source.is_file() else [file for file in sorted(source.iterdir()) if file.is_file()]
    for file in files:
        if file.name != LOCK_FILE:
            shutil.copy2(file, run_dir / file.name)
    return source.name if source.is_file() else "."


def _is_same_run(source: Path, run_dir: Path) -> bool:
    ours, theirs = run_dir / RUN_FILE, source / RUN_FILE
    return ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)
