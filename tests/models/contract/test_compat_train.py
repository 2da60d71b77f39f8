# SPDX-License-Identifier: Apache-2.0
"""The reference scripts' calls, as published, and the recipes they stand for."""

import tomllib

import pytest

from models.contract.compat_train import WITHOUT_ARGUMENTS, recipe_toml, script_recipe
from models.contract.errors import ConfigError
from models.contract.recipe import parse_recipe

SEVEN_B = [
    "dsw",
    "7B",
    "1",
    "64",
    "1e-5",
    "1e-6",
    "8192",
    "8192",
    "bf16",
    "1",
    "1",
    "1",
    "true",
    "true",
    "false",
    "false",
    "false",
    "100000",
    "./wds",
    "./wds",
    "./mcore",
    "500",
    "100",
    "./out",
]
THIRTY_B = [
    "dsw",
    "A3B",
    "1",
    "128",
    "1e-5",
    "1e-6",
    "16384",
    "16384",
    "bf16",
    "4",
    "4",
    "1",
    "1",
    "4",
    "true",
    "true",
    "true",
    "false",
    "false",
    "100000",
    "/d",
    "/v",
    "/c",
    "500",
    "50",
    "/o",
]


def test_script_recipe_of_the_published_7b_call() -> None:
    recipe = script_recipe("run_mcore_qwen.sh", SEVEN_B)
    assert recipe.model.family == "qwen2_5_vl"
    assert (recipe.num_processes, recipe.data_parallel_size, recipe.num_microbatches) == (8, 8, 8)
    assert (recipe.optimizer.lr_warmup_iters, recipe.lr_decay_iters) == (100, 400)
    assert recipe.train.loss_reduction == "per_sample"
    assert not recipe.parallel.sequence_parallel  # SP without tensor parallel does nothing
    assert any("SP has no effect" in note for note in recipe.notes)
    # the script evaluates ten global batches every thousand iterations, and at the end
    assert (recipe.train.eval_interval, recipe.train.eval_samples) == (1000, 640)


def test_script_recipe_of_the_published_30b_call_reads_etp_before_ep() -> None:
    recipe = script_recipe("run_mcore_qwen", THIRTY_B)
    parallel = recipe.parallel
    assert recipe.model.family == "qwen3_vl"
    assert (parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size) == (1, 4)
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (4, 4)
    assert (recipe.num_processes, recipe.optimizer.lr_warmup_iters, recipe.lr_decay_iters) == (16, 50, 450)


@pytest.mark.parametrize("script", WITHOUT_ARGUMENTS)
def test_script_recipe_of_scripts_without_arguments_is_shipped(script: str) -> None:
    recipe = script_recipe(script, [])
    assert recipe.optimizer.lr == 6e-5
    assert recipe.optimizer.weight_decay == 0.1
    assert (recipe.model.num_layers == 4) == script.startswith("debug")


@pytest.mark.parametrize("arguments", [SEVEN_B, THIRTY_B])
def test_recipe_toml_reads_back_to_the_same_recipe(arguments: list[str]) -> None:
    recipe = script_recipe("run_mcore_qwen", arguments)
    assert parse_recipe(tomllib.loads(recipe_toml(recipe)), where="text") == recipe


def test_recipe_toml_reads_back_a_table_in_a_section() -> None:
    data = script_recipe("run_mcore_qwen", SEVEN_B).model_dump(mode="json")
    data["data"] |= {
        "dataset": "fixed-shapes",
        "fixed_shapes": {"samples": 1, "images": 2, "image_size": 336},
    }
    recipe = parse_recipe(data, where="test")
    assert "fixed_shapes = { samples = 1, images = 2, image_size = 336 }" in recipe_toml(recipe)
    assert parse_recipe(tomllib.loads(recipe_toml(recipe)), where="text") == recipe


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("run_mcore_qwen", SEVEN_B[:-1], "wrong number of arguments"),
        ("run_mcore_llama", [], "unknown script"),
        ("debug_mcore_qwen3_vl", ["dsw"], "takes no arguments"),
        ("run_mcore_qwen", [*SEVEN_B[:9], "x", *SEVEN_B[10:]], "argument TP is not a whole number"),
        ("run_mcore_qwen", [*SEVEN_B[:1], "6B", *SEVEN_B[2:]], "argument MODEL_SIZE is unknown"),
        ("run_mcore_qwen", [*SEVEN_B[:1], "A3B", *SEVEN_B[2:]], "A3B is a size of Qwen3-VL"),
        ("run_mcore_qwen", [*THIRTY_B[:1], "7B", *THIRTY_B[2:]], "7B is a size of Qwen2.5-VL"),
        (
            "run_mcore_qwen",
            [*SEVEN_B[:9], "0", *SEVEN_B[10:]],
            "argument TP is not a whole number of at least 1",
        ),
        ("run_mcore_qwen", [*THIRTY_B[:13], "0", *THIRTY_B[14:]], "argument EP is not a whole number"),
        ("run_mcore_qwen", [*SEVEN_B[:2], "²", *SEVEN_B[3:]], "argument BATCH_SIZE is not a whole number"),
        ("run_mcore_qwen", [*SEVEN_B[:21], "100", "100", SEVEN_B[23]], "LR_WARMUP_ITERS leaves nothing"),
    ],
)
def test_script_recipe_names_the_wrong_argument(script: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        script_recipe(script, arguments)
