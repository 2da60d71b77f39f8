# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind in its process."""

from collections.abc import Callable
from pathlib import Path

import psutil

from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training.progress import TrainOptions
from models.training.start import train


def test_runs_leave_no_threads_behind(site: Site, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    counts = []
    for number in range(2):
        train(make_recipe(), site, tmp_path / str(number), TrainOptions(stop_after=1))
        counts.append(psutil.Process().num_threads())
    assert counts[1] - counts[0] < 10  # a run has about fifty threads of process groups
