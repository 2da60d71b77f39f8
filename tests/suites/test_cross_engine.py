# SPDX-License-Identifier: Apache-2.0
"""The cross-engine suite can fail: differences between the engines that were planted do not pass its paired steps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.cases import SUITES
from harness.partner import step_gaps
from harness.records import load_record
from models.contract.recipe import Recipe, load_recipe, parse_recipe
from models.contract.site import Site
from models.conversion.tiny import write_tiny_checkpoint
from models.datasets.prepare.job import write_dataset
from models.datasets.prepare.synthetic import ConvertScene
from models.training.progress import TrainOptions
from models.training.start import train
from suites.cross_engine.test_cross_engine import FIRST_LOSS_GAP, NUM_PAIRED, PAIRED_GAP

Gaps = Callable[[Recipe], np.ndarray]
CHECKPOINT = "tiny-qwen2_5_vl"
RECIPE = load_recipe(SUITES / "cross_engine" / "tiny_qwen2_5_vl_fsdp2.toml")


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Gaps:
    """Trains an FSDP2 recipe for the paired steps; returns its distance from Megatron's run of the suite's recipe."""
    root = tmp_path_factory.mktemp("engines")
    site = Site(checkpoints=str(root), datasets=str(root), scratch=str(root / "scratch"))
    write_tiny_checkpoint(root / CHECKPOINT, "qwen2_5_vl")
    splits = {"train": [("train", index) for index in range(NUM_PAIRED * 8)]}
    write_dataset(root / "colours", splits, ConvertScene("colours", 0), about={}, shard_size=20)
    folder = root / "turned"  # the rotary sections of height and width the other way round
    shutil.copytree(root / CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    scaling = next(part for part in (config, config.get("text_config", {})) if "rope_scaling" in part)[
        "rope_scaling"
    ]
    time, height, width = scaling["mrope_section"]
    scaling["mrope_section"] = [height, time, width]
    (folder / "config.json").write_text(json.dumps(config))
    torch.set_num_threads(1)

    def run(recipe: Recipe, name: str) -> Path:
        data = recipe.model_dump(mode="json")
        data["train"] |= {"eval_interval": None, "eval_samples": 0}
        train(parse_recipe(data, where=name), site, root / name, TrainOptions(stop_after=NUM_PAIRED))
        return root / name

    reference = load_record(run(changed({"train": {"engine": "megatron"}}), "megatron"))
    count = iter(range(100))
    return lambda recipe: step_gaps(load_record(run(recipe, f"fsdp2-{next(count)}")), reference)


def changed(changes: dict[str, dict[str, Any]]) -> Recipe:
    data = RECIPE.model_dump(mode="json")
    for section, values in changes.items():
        data[section] |= values
    return parse_recipe(data, where="test")


def is_alike(found: np.ndarray) -> bool:
    return bool(found[0] <= FIRST_LOSS_GAP["fp32"] and found.max() <= PAIRED_GAP["fp32"])


@pytest.mark.slow
def test_engines_without_a_fault_are_alike(gaps: Gaps) -> None:
    assert is_alike(gaps(RECIPE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"optimizer": {"weight_decay": 0.1}}, id="weight-decay"),
        pytest.param({"optimizer": {"adam_beta2": 0.999}}, id="beta2"),
        pytest.param({"optimizer": {"clip_grad": 0.0}}, id="no-clipping"),
        pytest.param({"optimizer": {"lr_warmup_iters": 31}}, id="warmup-one-longer"),
        pytest.param({"optimizer": {"projector_lr_mult": 1.0}}, id="rate-of-the-projector"),
        pytest.param({"train": {"loss_reduction": "per_sample"}}, id="mean-over-samples"),
        pytest.param(
            {"model": {"freeze": ["projector"]}, "optimizer": {"projector_lr_mult": 1.0}},
            id="frozen-projector",
        ),
        pytest.param({"data": {"preprocessing": "reference"}}, id="image-normalisation"),
        pytest.param({"model": {"checkpoint": "turned"}}, id="rotary-sections"),
    ],
)
def test_a_planted_difference_is_caught(fault: dict[str, dict[str, Any]], gaps: Gaps) -> None:
    found = gaps(changed(fault))
    assert not is_alike(found), f"first {found[0]:.1e}, largest {found.max():.1e}"
