# SPDX-License-Identifier: Apache-2.0
"""Whole runs on rows of a stated shape: nothing is read, every family trains, a resumed run sees what it would have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, parse_recipe
from models.contract.record import read_run_info
from models.contract.site import Site
from models.contract.tiny_config import tiny_config
from models.training.progress import TrainOptions
from models.training.start import train
from tests.models.training.trainer import Trainer

Rows = Callable[[Path], list[dict[str, Any]]]
FAMILIES = {
    "tiny-qwen2_5_vl": ("qwen2_5_vl", False, 56),  # name: family, experts, side of an image
    "tiny-qwen3_vl": ("qwen3_vl", False, 64),
    "tiny-qwen3_vl_moe": ("qwen3_vl", True, 64),
    "tiny-qwen3_omni": ("qwen3_omni", True, 64),
}
PLAIN = TrainOptions()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site whose checkpoints are their config.json, and which has no dataset."""
    root = tmp_path_factory.mktemp("configs")
    for name, (family, is_moe, _) in FAMILIES.items():
        (root / name).mkdir()
        config = tiny_config(family, moe=is_moe and family == "qwen3_vl")
        (root / name / "config.json").write_text(json.dumps(config))
    return Site(checkpoints=str(root), datasets=str(root / "none"), scratch=str(root / "scratch"))


def recipe(name: str = "tiny-qwen2_5_vl", num_processes: int = 1, **sections: dict[str, Any]) -> Recipe:
    """Four steps of two packed rows: two samples of 48 tokens with an image of 4 merged tokens each."""
    family, _, side = FAMILIES[name]
    data: dict[str, Any] = {
        "name": "fixed",
        "num_processes": num_processes,
        "model": {"family": family, "checkpoint": name, "init": "random"},
        "data": {
            "dataset": "fixed-shapes",
            "seq_length": 96,
            "packing": True,
            "fixed_shapes": {"samples": 2, "images": 2, "image_size": side},
        },
        "train": {"train_iters": 4, "micro_batch_size": 1, "global_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"save_final": False},
    }
    for section, changes in sections.items():
        data[section] = data.get(section, {}) | changes
    return parse_recipe(data, where="test")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_on_packed_rows_with_images(
    name: str, configs: Site, tmp_path: Path, rows_of: Rows
) -> None:
    short = recipe(name, train={"train_iters": 2})
    assert train(short, configs, tmp_path, PLAIN) == "completed"
    for row in rows_of(tmp_path):
        assert row["num_padded_tokens"] == row["num_real_tokens"] == 2 * 96
        assert (row["num_images"], row["num_vision_tokens"]) == (4, 16)
        assert row["num_supervised_tokens"] == 2 * 96 - 16
        assert row["lm_loss"] == pytest.approx(6.3, abs=0.6)  # ln of 553 words
    info = read_run_info(tmp_path)
    assert (info.sample_counts, info.skipped_samples) == ({"consumed": 4, "skipped": 0}, [])
    first, second = (row["sample_digest"] for row in rows_of(tmp_path))
    assert first != second


@pytest.mark.parametrize(("name", "images"), [("tiny-qwen2_5_vl", 0), ("tiny-qwen3_vl", 1)])
def test_a_row_of_one_sample_is_not_packed(
    name: str, images: int, configs: Site, tmp_path: Path, rows_of: Rows
) -> None:
    shapes = {"samples": 1, "images": images, "image_size": FAMILIES[name][2]}
    plain = recipe(name, train={"train_iters": 1}, data={"packing": False, "fixed_shapes": shapes})
    train(plain, configs, tmp_path, PLAIN)
    [row] = rows_of(tmp_path)
    assert (row["num_images"], row["num_vision_tokens"]) == (2 * images, 8 * images)
    assert row["num_real_tokens"] == 2 * 96


@pytest.mark.slow
def test_resume_repeats_the_uninterrupted_run_to_the_bit(
    configs: Site, tmp_path: Path, rows_of: Rows
) -> None:
    saving = recipe("tiny-qwen3_vl", checkpoint={"save_interval": 2})
    train(saving, configs, tmp_path / "whole", PLAIN)
    assert train(saving, configs, tmp_path / "cut", TrainOptions(stop_after=3)) == "interrupted"
    assert train(saving, configs, tmp_path / "cut", TrainOptions(is_resume=True)) == "completed"
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    digests = [read_run_info(tmp_path / name).data_order_digest for name in ("cut", "whole")]
    assert digests[0] == digests[1]


def test_what_does_not_fit_is_refused_before_anything_is_built(configs: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 rule") as caught:
        train(
            recipe(data={"fixed_shapes": {"samples": 2, "images": 20, "image_size": 60}}),
            configs, tmp_path / "run", PLAIN,
        )  # fmt: skip
    assert "data.fixed_shapes.image_size: the side of an image" in str(caught.value)
    assert "data.fixed_shapes.images: the images of a sample" in str(caught.value)
    assert read_run_info(tmp_path / "run").outcome.phase == "startup"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "fsdp2"])
def test_two_ranks_see_other_rows_and_together_those_of_one(
    engine: str, site: Site, trainer: Trainer, tmp_path: Path, rows_of: Rows
) -> None:
    """The checkpoint of the site has weights and a tokenizer too, which nobody looks at."""
    sections: dict[str, Any] = {
        "train": {"engine": engine},
        "parallel": {"overlap_grad_reduce": engine == "megatron"},
        "checkpoint": {"save_interval": 2, "resharding": "data"},
    }
    one, two = (recipe(num_processes=count, **sections) for count in (1, 2))
    trainer.run(one, tmp_path / "one")
    trainer.run(two, tmp_path / "two")
    alone, shared = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["sample_digest"] for row in shared] == [row["sample_digest"] for row in alone]
    assert [row["lm_loss"] for row in shared] == pytest.approx([row["lm_loss"] for row in alone], rel=1e-5)
    # and a run may change hands
    trainer.run(two, tmp_path / "cut", "--stop-after", "2")
    trainer.run(one, tmp_path / "cut", "--resume")
    assert [row["sample_digest"] for row in rows_of(tmp_path / "cut")] == [
        row["sample_digest"] for row in alone
    ]
