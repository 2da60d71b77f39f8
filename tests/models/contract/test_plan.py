# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a recipe, from sizes alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import models.contract
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.families import detect_family, family_part
from models.contract.layout import check_layout
from models.contract.memory import GIB, count_parameters, estimate_memory
from models.contract.plan import checkpoint_bytes, plan_training, require_fit
from models.contract.recipe import Recipe, load_recipe, parse_recipe
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


@pytest.mark.parametrize(("num_layers", "bf16", "fp8"), [(8, 75.52, 77.65), (28, 108.40, 115.75)])
def test_estimate_memory_knows_what_fp8_adds(num_layers: int, bf16: float, fp8: float) -> None:
    """GiB that Qwen2.5-VL-7B took on an H200 (benchmarks/gpu_step.py): weights once more, and inputs in one byte."""
    data = load_recipe(SUITES / "throughput" / "qwen2_5_vl_7b_padded.toml").model_dump()
    found = []
    for name in (None, "tensorwise"):
        data["model"]["num_layers"], data["precision"]["fp8"] = num_layers, name
        memory = estimate_memory(Recipe.model_validate(data), architecture("qwen2_5_vl_7b"))
        found.append(memory.weights + memory.activations)
    assert (found[1] - found[0]) / GIB == pytest.approx(fp8 - bf16, rel=0.03)


def test_plan_names_the_smallest_change_that_fits() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen3_vl_8b_one_gpu.toml")
    plan = plan_training(recipe, architecture("qwen3_vl_8b"), memory_gib=96, bf16_tflops=148.0)
    assert not plan.fits
    assert plan.suggestion == "optimizer.cpu_offload_fraction = 1.0"
    with pytest.raises(ConfigError, match=r"cpu_offload_fraction = 1\.0"):
        require_fit(plan, recipe)


def test_plan_suggestion_is_true() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen3_vl_8b_one_gpu.toml")
    data = recipe.model_dump(mode="json")
    data["optimizer"]["cpu_offload_fraction"] = 1.0
    changed = parse_recipe(data, where="changed")
    assert plan_training(changed, architecture("qwen3_vl_8b"), memory_gib=96, bf16_tflops=None).fits


def test_plan_time_follows_from_the_formula_and_the_peak() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen2_5_vl_7b_llava_pretrain.toml")
    plan = plan_training(
        recipe, architecture("qwen2_5_vl_7b"), memory_gib=141, bf16_tflops=1000.0, share_of_peak=0.5
    )
    # 47.354216448 GFLOP a token, 64 x 8192 tokens, 8 devices at 500 TFLOP/s
    assert plan.expected_step_time_s == pytest.approx(47_354_216_448 * 64 * 8192 / 4e15)


def changed_by(suggestion: str, data: dict[str, Any]) -> Recipe:
    """The recipe after the change that a suggestion words."""
    for change in re.split(r" and | with ", suggestion):
        key, value = change.split(" = ")
        section, _, name = key.rpartition(".")
        data[section or "parallel"][name] = json.loads(value)
    return parse_recipe(data, where="changed")


@pytest.mark.parametrize("memory_gib", [24, 40, 64, 80])
@pytest.mark.parametrize(
    ("recipe_file", "size"),
    [
        ("convergence/qwen3_vl_30b_a3b_lite.toml", "qwen3_vl_30b_a3b"),
        ("convergence/qwen3_vl_30b_a3b_fsdp2.toml", "qwen3_vl_30b_a3b"),
        ("convergence/qwen2_5_vl_7b_llava_pretrain.toml", "qwen2_5_vl_7b"),
        ("debug/qwen3_vl_30b_a3b_debug.toml", "qwen3_vl_30b_a3b"),
    ],
)
def test_plan_suggestion_fits_and_breaks_no_rule(recipe_file: str, size: str, memory_gib: int) -> None:
    recipe, sizes = load_recipe(SUITES / recipe_file), architecture(size)
    plan = plan_training(recipe, sizes, memory_gib=memory_gib, bf16_tflops=None)
    if plan.fits:
        assert plan.suggestion is None
        return
    assert plan.suggestion is not None
    if "more devices" in plan.suggestion:
        return
    changed = changed_by(plan.suggestion, recipe.model_dump(mode="json"))
    assert plan_training(changed, sizes, memory_gib=memory_gib, bf16_tflops=None).fits
    assert check_layout(sizes, changed) == []
    if recipe.train.engine == "fsdp2":  # what that engine refuses must not be suggested
        assert "parallel" not in plan.suggestion
        assert "precision_aware" not in plan.suggestion
        assert "0.5" not in plan.suggestion


def test_estimate_memory_of_fsdp2_shards_everything_and_holds_two_layers_whole() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen3_vl_30b_a3b_fsdp2.toml")
    sizes = architecture("qwen3_vl_30b_a3b")
    memory, counts = estimate_memory(recipe, sizes), count_parameters(sizes)
    trained = counts.total - counts.vision  # the recipe freezes the vision tower and its mergers
    assert memory.optimizer == trained * 8 / 8
    assert memory.gradients == trained * 4 / 8
    whole = 2 * (counts.language + counts.experts) / 48 + counts.embedding
    assert memory.weights == pytest.approx(counts.total * 4 / 8 + whole * 2)


def test_checkpoint_bytes_hold_the_optimizer_where_it_is_saved() -> None:
    recipe = load_recipe(SUITES / "convergence" / "qwen2_5_vl_7b_llava_pretrain.toml")
    data = recipe.model_dump(mode="json")
    data["checkpoint"]["save_optimizer"] = True
    sizes = architecture("qwen2_5_vl_7b")
    assert checkpoint_bytes(recipe, sizes) == 8_292_166_656 * 2
    assert checkpoint_bytes(parse_recipe(data, where="with optimizer"), sizes) == 8_292_166_656 * 14
