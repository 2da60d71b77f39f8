# SPDX-License-Identifier: Apache-2.0
"""What was judged is copied for the report; the source and other runs stay as they are."""

from pathlib import Path

import pytest

from harness.judged import keep_judged
from harness.records import load_record
from models.contract.errors import RunError
from models.contract.record import METRICS_FILE, RUN_FILE
from suites.detection.synthetic import SyntheticRun, write_synthetic_run


def test_run_is_kept_without_checkpoints_and_locks(tmp_path: Path) -> None:
    source = write_synthetic_run(tmp_path / "theirs", SyntheticRun())
    (source / "checkpoints").mkdir()
    (source / "checkpoints" / "weights").write_text("large")
    (source / ".lock").touch()
    kept = tmp_path / "runs" / "case"
    assert keep_judged(source, kept) == "."
    assert keep_judged(source, kept) == "."  # a session that is repeated
    assert not (kept / "checkpoints").exists()
    assert not (kept / ".lock").exists()
    assert load_record(kept).series.equals(load_record(source).series)
    assert {RUN_FILE, METRICS_FILE} <= {file.name for file in kept.iterdir()}


def test_log_is_kept_under_its_name(tmp_path: Path) -> None:
    log = tmp_path / "theirs.log.gz"
    log.write_bytes(b"not read here")
    assert keep_judged(log, tmp_path / "case") == "theirs.log.gz"
    assert (tmp_path / "case" / "theirs.log.gz").read_bytes() == b"not read here"


def test_run_that_lies_there_already_is_not_copied(tmp_path: Path) -> None:
    source = write_synthetic_run(tmp_path / "run", SyntheticRun())
    before = sorted(source.iterdir())
    assert keep_judged(source, tmp_path / "x" / ".." / "run") == "."
    assert sorted(source.iterdir()) == before


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    source = write_synthetic_run(tmp_path / "one", SyntheticRun())
    other = write_synthetic_run(tmp_path / "other", SyntheticRun(run_seed=2))
    with pytest.raises(RunError, match="already holds a run"):
        keep_judged(source, other)
