# SPDX-License-Identifier: Apache-2.0
"""A site with a tiny checkpoint and a few scenes, and recipes small enough to train inside a test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.contract.recipe import Recipe, parse_recipe
from models.contract.site import Site
from models.conversion.tiny import write_tiny_checkpoint
from models.datasets.prepare.job import write_dataset
from models.datasets.prepare.synthetic import ConvertScene
from tests.models.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    (root / "datasets").mkdir()
    write_tiny_checkpoint(root / "checkpoints" / "tiny-qwen2_5_vl", "qwen2_5_vl")
    write_tiny_checkpoint(root / "checkpoints" / "tiny-qwen3_vl", "qwen3_vl")
    splits = {
        "train": [("train", index) for index in range(64)],
        "val": [("val", index) for index in range(16)],
    }
    write_dataset(root / "datasets" / "scenes", splits, ConvertScene("scenes", 0), about={}, shard_size=16)
    return Site(
        checkpoints=str(root / "checkpoints"), datasets=str(root / "datasets"), scratch=str(root / "scratch")
    )


@pytest.fixture(scope="session")
def all_families(site: Site) -> Site:
    """The same site with the mixture of experts, and with sound."""
    checkpoints, datasets = Path(site.checkpoints), Path(site.datasets)
    write_tiny_checkpoint(checkpoints / "tiny-qwen3_vl_moe", "qwen3_vl", moe=True)
    write_tiny_checkpoint(checkpoints / "tiny-qwen3_omni", "qwen3_omni")
    splits = {
        "train": [("train", index) for index in range(32)], "val": [("val", index) for index in range(8)],
    }  # fmt: skip
    write_dataset(datasets / "scenes-audio", splits, ConvertScene("scenes-audio", 0), about={}, shard_size=16)
    return site


@pytest.fixture(scope="session")
def trainer(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Starts runs of several processes."""
    found = Trainer(site, tmp_path_factory.mktemp("trainer"))
    yield found
    found.close()


@pytest.fixture
def make_recipe() -> MakeRecipe:
    """Build a recipe of six small steps; a keyword per section adds or changes its keys."""

    def make(num_processes: int = 1, **sections: dict[str, Any]) -> Recipe:
        data: dict[str, Any] = {
            "name": "test",
            "num_processes": num_processes,
            "model": {"family": "qwen2_5_vl", "checkpoint": "tiny-qwen2_5_vl"},
            "data": {"dataset": "scenes", "seq_length": 128, "padding": "longest"},
            "train": {"train_iters": 6, "micro_batch_size": 2, "global_batch_size": 4},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 2},
            "precision": {"dtype": "fp32"},
            "checkpoint": {"save_final": False, "resharding": "any"},
        }
        for section, changes in sections.items():
            data[section] = data.get(section, {}) | changes
        return parse_recipe(data, where="test")

    return make


@pytest.fixture(autouse=True)
def one_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as one process without a launcher, on one core."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.set_num_threads(1)


@pytest.fixture
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a run's metrics without what a clock or the allocator decides."""
    from models.contract.record import iter_metrics

    volatile = {"peak_memory_bytes"}

    def read(directory: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if key not in volatile and not key.endswith("_time_ms")}
            for row in iter_metrics(directory)
        ]

    return read
