# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind in its process: nothing that the next one could meet."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from models.contract.recipe import Recipe
from models.contract.record import iter_metrics
from models.contract.site import Site
from models.training import random_state
from models.training.progress import TrainOptions
from models.training.start import train


def test_runs_leave_no_threads_behind(site: Site, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    counts = []
    for number in range(2):
        train(make_recipe(), site, tmp_path / str(number), TrainOptions(stop_after=1))
        counts.append(psutil.Process().num_threads())
    assert counts[1] - counts[0] < 10  # a run has about fifty threads of process groups


@pytest.mark.slow
def test_runs_leave_no_generators_behind(
    site: Site, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A checkpoint of an engine that has none is read after a run of one that has."""
    random_state.reset_tensor_parallel()  # as in a fresh process
    saves = {"save_interval": 1, "resharding": "data"}
    fsdp2 = make_recipe(train={"engine": "fsdp2"}, checkpoint=saves)
    train(fsdp2, site, tmp_path / "fsdp2", TrainOptions(stop_after=1))
    train(make_recipe(), site, tmp_path / "megatron", TrainOptions(stop_after=1))
    resumed = TrainOptions(stop_after=2, is_resume=True)
    assert train(fsdp2, site, tmp_path / "fsdp2", resumed) == "interrupted"


@pytest.mark.slow
def test_runs_leave_no_log_of_experts_behind(
    all_families: Site, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """megatron-core's has a place for each layer of the first model."""
    for num_layers in (2, 3):
        model = {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl_moe", "num_layers": num_layers}
        train(make_recipe(model=model), all_families, tmp_path / str(num_layers), TrainOptions(stop_after=1))
    train(make_recipe(), all_families, tmp_path / "dense", TrainOptions(stop_after=1))
    rows = [next(iter_metrics(tmp_path / name)) for name in ("2", "3", "dense")]
    assert [list(row["extra"]) for row in rows] == [["load_balancing_loss"], ["load_balancing_loss"], []]
