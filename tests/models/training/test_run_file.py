# SPDX-License-Identifier: Apache-2.0
"""``run.json`` names the rank that failed first, whatever the others write after it."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.contract.errors import ConfigError, DataError, RunError
from models.contract.recipe import Recipe
from models.contract.record import METRICS_FILE, RUN_FILE, read_run_info, write_run_info
from models.contract.site import Site
from models.training import run_file
from models.training.progress import TrainOptions
from models.training.run_file import (
    FAILURES,
    LOCK_FILE,
    claim_directory,
    cut_metrics,
    directory_held,
    failures_recorded,
    record_failure,
    recorded_digests,
)
from models.training.start import train

MakeRecipe = Callable[..., Recipe]


def test_the_first_failure_is_the_outcome(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    info = claim_directory(tmp_path / "run", make_recipe(), world_size=2, is_resume=False)
    record_failure(tmp_path / "run", 1, DataError("unusable sample", fix="drop it"))
    write_run_info(tmp_path / "run", info)  # rank 0 still thinks that all is well
    assert read_run_info(tmp_path / "run").outcome.status == "running"
    with pytest.raises(RuntimeError), failures_recorded(tmp_path / "run", 0):
        raise RuntimeError("Connection closed by peer")
    outcome = read_run_info(tmp_path / "run").outcome
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("rank 1: DataError: unusable sample")
    assert "Traceback" not in outcome.error
    assert sorted(file.name for file in (tmp_path / "run" / FAILURES).iterdir()) == [
        "rank_00000.json", "rank_00001.json",
    ]  # fmt: skip


def test_a_resumed_run_forgets_the_failures_before_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=True)
    record_failure(tmp_path, 0, ValueError("first attempt"))
    (tmp_path / "run.json.0.partial").touch()  # it was killed while it wrote
    claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=True)
    record_failure(tmp_path, 0, ValueError("second attempt"))
    assert "second attempt" in str(read_run_info(tmp_path).outcome.error)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_ended_well_stays_so(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    info = claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=True)
    info.outcome.status = "completed"
    write_run_info(tmp_path, info)
    record_failure(tmp_path, 0, ValueError("while the interpreter shut down"))
    assert read_run_info(tmp_path).outcome.status == "completed"


def test_ranks_that_fail_together_do_not_take_each_others_file(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_directory(tmp_path, make_recipe(), world_size=2, is_resume=False)
    replace = Path.replace

    def meanwhile_another_rank_writes(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        record_failure(tmp_path, 1, ValueError("second"))
        return replace(self, target)

    info = read_run_info(tmp_path)
    monkeypatch.setattr(Path, "replace", meanwhile_another_rank_writes)
    write_run_info(tmp_path, info)
    assert not list(tmp_path.glob("*.partial"))


def test_a_resume_that_may_yet_be_refused_keeps_what_the_run_was(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    first = claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=False)
    first.outcome.status, first.data_order_digest = "interrupted", "d"
    write_run_info(tmp_path, first)
    other = make_recipe(optimizer={"lr": 2e-3})
    info = claim_directory(tmp_path, other, world_size=1, is_resume=True)
    assert info.recipe_sha == other.sha()  # for when the checkpoint has proved to be of this recipe
    found = read_run_info(tmp_path)
    assert (found.recipe_sha, found.data_order_digest, found.started_at) == (
        first.recipe_sha, "d", info.started_at,
    )  # fmt: skip
    assert (found.outcome.status, found.outcome.phase) == ("running", "startup")


def test_a_run_file_that_cannot_be_read_is_written_anew(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text("{")
    claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=True)
    assert read_run_info(tmp_path).outcome.status == "running"


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_run_directory(below: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the run directory cannot be made") as caught:
        claim_directory(tmp_path / "file" / below, make_recipe(), world_size=1, is_resume=False)
    assert caught.value.got == f"{tmp_path / 'file'} is a file"


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_where_a_run_begins(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_file, "write_run_info", full_disk)
    with pytest.raises(RunError, match="the run directory cannot be written") as caught:
        claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=False)
    assert caught.value.got.startswith("No space left on device; ")
    assert "--resume" in caught.value.fix


def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_raised(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claim_directory(tmp_path, make_recipe(), world_size=1, is_resume=False)
    monkeypatch.setattr(run_file, "write_run_info", full_disk)
    with pytest.raises(DataError, match="unusable sample"), failures_recorded(tmp_path, 0):
        raise DataError("unusable sample", fix="drop it")
    assert "cannot be written" in caplog.text


def test_metrics_are_cut_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"iteration": number, "sample_digest": str(number)} for number in (1, 2, 3)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    assert recorded_digests(tmp_path) == {1: "1", 2: "2", 3: "3"}
    before = (tmp_path / METRICS_FILE).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(RunError, match="cannot be written"):
            cut_metrics(tmp_path, 2)
    assert (tmp_path / METRICS_FILE).read_text() == before
    cut_metrics(tmp_path, 2)
    assert recorded_digests(tmp_path) == {1: "1", 2: "2"}


HOLDER = """
import sys, time
from pathlib import Path
from models.training.run_file import directory_held
with directory_held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_train_in_one_directory(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process trains in this directory") as caught:
            train(make_recipe(), site, run, TrainOptions(is_resume=True))
        assert not (run / RUN_FILE).exists()
        assert caught.value.got.startswith(f"process {holder.pid} of ")
        holder.kill()
    with directory_held(run):  # the kernel took it from the process that was killed
        assert (run / LOCK_FILE).read_text().startswith(f"process {os.getpid()} of ")


def test_a_disk_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with directory_held(tmp_path):
        pass
