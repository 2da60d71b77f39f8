# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a recipe, from sizes alone."""

import json
from pathlib import Path

import pytest

import models.contract
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.families import detect_family, family_part
from models.contract.memory import count_parameters, estimate_memory
from models.contract.plan import plan_training, require_fit
from models.contract.recipe import load_recipe, parse_recipe
from models.contract.site import REPOSITORY

PUBLISHED = Path(models.contract.__file__).parent / "published"
SUITES = REPOSITORY / "suites"


def architecture(name: str) -> Architecture:
    config = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    return family_part(detect_family(config), "config").ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # Sums over the published checkpoints' indexes.
        ("qwen2_5_vl_3b", 3_754_622_976),
        ("qwen2_5_vl_7b", 8_292_166_656),
        ("qwen3_vl_8b", 8_767_123_696),
        ("qwen3_vl_30b_a3b", 31_070_754_032),
    ],
)
def test_count_parameters_equals_the_checkpoint(name: str, total: int) -> None:
    assert count_parameters(architecture(name)).total == total


def test_estimate_memory_shards_optimizer_states_over_data_parallel_ranks() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen2_5_vl_7b_llava_pretrain.toml")
    memory = estimate_memory(recipe, architecture("qwen2_5_vl_7b"))
    parameters = 8_292_166_656
    assert memory.weights == parameters * 2
    assert memory.gradients == parameters * 4
    assert memory.optimizer == parameters * 12 / 8


def test_plan_names_the_smallest_change_that_fits() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen3_vl_8b_one_gpu.toml")
    plan = plan_training(recipe, architecture("qwen3_vl_8b"), memory_gib=96, bf16_tflops=148.0)
    assert not plan.fits
    assert plan.suggestion == "optimizer.cpu_offload_fraction = 0.5"
    with pytest.raises(ConfigError, match=r"cpu_offload_fraction = 0\.5"):
        require_fit(plan, recipe)


def test_plan_suggestion_is_true() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen3_vl_8b_one_gpu.toml")
    data = recipe.model_dump(mode="json")
    data["optimizer"]["cpu_offload_fraction"] = 0.5
    changed = parse_recipe(data, where="changed")
    assert plan_training(changed, architecture("qwen3_vl_8b"), memory_gib=96, bf16_tflops=None).fits


def test_plan_time_follows_from_the_formula_and_the_peak() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen2_5_vl_7b_llava_pretrain.toml")
    plan = plan_training(
        recipe, architecture("qwen2_5_vl_7b"), memory_gib=141, bf16_tflops=1000.0, share_of_peak=0.5
    )
    # 47.354216448 GFLOP a token, 64 x 8192 tokens, 8 devices at 500 TFLOP/s
    assert plan.expected_step_time_s == pytest.approx(47_354_216_448 * 64 * 8192 / 4e15)
