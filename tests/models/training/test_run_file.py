# SPDX-License-Identifier: Apache-2.0
"""``run.json`` names the rank that failed first, whatever the others write after it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from models.contract.errors import DataError
from models.contract.recipe import Recipe
from models.contract.record import read_run_info, write_run_info
from models.training.run_file import FAILURES, claim_directory, failures_recorded, record_failure

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
