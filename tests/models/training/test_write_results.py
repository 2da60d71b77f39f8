# SPDX-License-Identifier: Apache-2.0
import multiprocessing
import queue
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training.progress import TrainOptions
from models.training.start import train
from models.training.write_results import WriteResults, collect_write_results


def test_items_of_a_fork_arrive_in_order() -> None:
    results = WriteResults()
    items = [{0: ["x" * 200_000]}, RuntimeError("disk full"), {}]

    def write() -> None:
        for item in items:
            results.put(item)

    for _ in range(2):  # again, once all are taken
        writer = multiprocessing.get_context("fork").Process(target=write)
        writer.start()
        writer.join()
        assert [repr(results.get_nowait()) for _ in items] == [repr(item) for item in items]
        with pytest.raises(queue.Empty):
            results.get_nowait()


def test_an_item_that_was_cut_short_is_none() -> None:
    results = WriteResults()
    results.put("whole")
    results.put("cut")
    results._file.truncate(results._file.seek(0, 2) - 1)
    assert results.get_nowait() == "whole"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_writers_of_this_process_start_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(filesystem_async.mp, "get_context", None)
    collect_write_results()
    found = filesystem_async.get_write_results_queue()
    found.put("written")
    assert found.get_nowait() == "written"


@pytest.mark.usefixtures("one_plain_process")
def test_a_training_that_saved_leaves_no_process(
    site: Site, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(checkpoint={"save_interval": 2, "async_save": True})
    before = {
        process.pid for process in psutil.Process().children(recursive=True)
    }  # of tests beside this one
    train(recipe, site, tmp_path / "run", TrainOptions(stop_after=2))
    new = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    commands = [" ".join(process.cmdline()) for process in new]
    # Python's tracker of semaphores stays as long as the tests' own process
    assert [command for command in commands if "resource_tracker" not in command] == []
