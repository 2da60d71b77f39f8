# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's tutorial call for Qwen3-VL-30B on FSDP2, and what is refused of its variants."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.contract.compat_fsdp2 import fsdp2_recipe
from models.contract.errors import ConfigError
from models.contract.recipe import load_recipe
from models.contract.site import REPOSITORY

MODEL: dict[str, Any] = {
    "model_id": "qwen3_vl_moe", "init_from_hf_path": "./ckpt/Qwen3-VL-30B-A3B-Instruct",
    "image_encoder": {"vision_encoder": {"freeze": True, "num_layers": 27}, "vision_projector": {"freeze": True}},
    "text_decoder": {"freeze": False, "num_layers": 48}, "loss_cfg": {"compute_mode": "default"},
}  # fmt: skip
DATA: dict[str, Any] = {
    "dataset_param": {
        "preprocess_parameters": {"image_max_pixels": 262144, "image_min_pixels": 1024},
        "basic_parameters": {"dataset": "./data/mllm.json", "train_on_prompt": False, "mask_history": False},
    },
    "dataloader_param": {"shuffle": True, "drop_last": True},
}  # fmt: skip
SHARDING = "sharding_size: auto\nreshard_after_forward: True\nparam_dtype: bf16\nreduce_dtype: fp32\n"
SCRIPT = (
    "--use-mcore-models --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1 "
    "--context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 8 --tokenizer-type NullTokenizer "
    "--vocab-size 152064 --seq-length 1024 --make-vocab-size-divisible-by 1 --normalization RMSNorm "
    "--use-fused-rmsnorm --swiglu --use-fused-swiglu --no-masked-softmax-fusion --lr 1.0e-5 --lr-decay-style cosine "
    "--weight-decay 0 "
    "--train-iters 10000 --lr-warmup-fraction 0.1 --clip-grad 0.0 --adam-beta1 0.9 --adam-beta2 0.999 "
    "--no-gradient-accumulation-fusion --seed 42 --load ckpt/dcp --use-flash-attn --no-load-optim --no-load-rng "
    "--no-save-optim --no-save-rng --num-workers 8 --use-torch-fsdp2 --untie-embeddings-and-output-weights "
    "--ckpt-format torch_dcp --optimizer-selection fused_torch_adamw --use-cpu-initialization "
    "--calculate-per-token-loss --init-model-with-meta-device --log-tps --log-interval 1 --save-interval 10000 "
    "--eval-interval 10000 --eval-iters 5000 --save save_dir --distributed-backend nccl"
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    (tmp_path / "fsdp2.yaml").write_text(SHARDING)
    return tmp_path


def with_basic(**more: Any) -> str:
    """``data.json`` with further basic parameters."""
    section = DATA["dataset_param"]
    return json.dumps(
        DATA | {"dataset_param": section | {"basic_parameters": section["basic_parameters"] | more}}
    )


def call(files: Path, *more: str, script: str = SCRIPT) -> list[str]:
    named = {"mm-model": "model.json", "mm-data": "data.json", "fsdp2-config-path": "fsdp2.yaml"}
    return [
        *script.split(), *(part for name, file in named.items() for part in (f"--{name}", str(files / file))), *more,
    ]  # fmt: skip


def test_the_tutorial_call_is_translated_whole(files: Path) -> None:
    recipe = fsdp2_recipe(call(files))
    assert (recipe.train.engine, recipe.num_processes, recipe.num_microbatches) == ("fsdp2", 8, 1)
    assert recipe.model.checkpoint == "./ckpt/Qwen3-VL-30B-A3B-Instruct"
    assert recipe.model.freeze == ("vision", "projector")
    assert (recipe.data.seq_length, recipe.data.min_pixels, recipe.data.max_pixels) == (1024, 1024, 262144)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.lr_warmup_iters, optimizer.weight_decay) == (1e-5, 1000, 0.0)
    assert (optimizer.adam_beta2, optimizer.clip_grad, optimizer.cpu_offload_fraction) == (0.999, 0.0, 0.0)
    assert (recipe.train.seed, recipe.train.loss_reduction) == (42, "per_token")
    assert (recipe.precision.dtype, recipe.precision.grad_reduce_in_fp32) == ("bf16", True)
    assert (recipe.checkpoint.save_interval, recipe.checkpoint.save_optimizer) == (10000, False)


def test_the_tutorial_call_is_the_shipped_recipe(files: Path) -> None:
    shipped = load_recipe(REPOSITORY / "suites" / "convergence" / "qwen3_vl_30b_a3b_fsdp2.toml").model_dump()
    translated = fsdp2_recipe(call(files)).model_dump()
    for recipe in (shipped, translated):
        for key in ("name", "description", "notes", "hardware"):
            del recipe[key]
        del recipe["model"]["checkpoint"], recipe["data"]["dataset"]
    assert translated == shipped


def test_offload_and_precision_come_from_the_yaml(files: Path) -> None:
    (files / "fsdp2.yaml").write_text("offload_to_cpu: True\nparam_dtype: float32\nreduce_dtype: bf16\n")
    recipe = fsdp2_recipe(call(files))
    assert recipe.optimizer.cpu_offload_fraction == 1.0
    assert (recipe.precision.dtype, recipe.precision.grad_reduce_in_fp32) == ("fp32", False)


def test_sharding_over_all_devices_may_be_a_number(files: Path) -> None:
    (files / "fsdp2.yaml").write_text("sharding_size: 8\n")
    assert fsdp2_recipe(call(files)).num_processes == 8


def test_an_audio_tower_is_frozen_as_asked(files: Path) -> None:
    omni = MODEL | {"model_id": "qwen3_omni_moe", "audio_encoder": {"audio_encoder": {"freeze": True}}}
    (files / "model.json").write_text(json.dumps(omni))
    assert fsdp2_recipe(call(files)).model.freeze == ("vision", "projector", "audio")


def test_limits_of_the_dataset_are_said(files: Path) -> None:
    (files / "data.json").write_text(with_basic(max_samples=10000))
    assert any("max_samples = 10000" in note for note in fsdp2_recipe(call(files)).notes)


def test_evaluation_needs_a_held_out_part(files: Path) -> None:
    recipe = fsdp2_recipe(call(files))
    assert recipe.train.eval_interval is None
    assert any("eval" in note for note in recipe.notes)
    (files / "data.json").write_text(with_basic(val_rate=0.1))
    recipe = fsdp2_recipe(call(files))
    assert (recipe.train.eval_interval, recipe.train.eval_samples) == (10000, 5000 * 8)


def test_a_folder_in_place_of_a_file_is_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        fsdp2_recipe([*call(files), "--mm-data", str(files)])


def test_number_of_devices_can_be_given(files: Path) -> None:
    assert fsdp2_recipe(call(files), num_processes=4).num_microbatches == 2


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("fsdp2.yaml", "sharding_sise: auto\n", "unknown keys"),
        ("fsdp2.yaml", "sharding_size: 4\n", "sharding over a part"),
        ("fsdp2.yaml", "reshard_after_forward: False\n", "always sharded again"),
        ("fsdp2.yaml", "a: [\n", "not valid YAML"),
        ("model.json", "{", "not valid JSON"),
        ("model.json", json.dumps(MODEL | {"model_id": "internvl"}), "unknown model_id"),
        ("model.json", json.dumps({"model_id": "qwen3_vl"}), "a key is missing"),
        ("data.json", json.dumps({"dataset_param": {}}), "a key is missing"),
        ("data.json", "[]", "not an object"),
        ("data.json", json.dumps(DATA | {"dataset_parm": {}}), "unknown keys"),
        ("data.json", with_basic(max_samplse=3), "unknown keys"),
        ("data.json", with_basic(enable_thinking=True), "no counterpart"),
        ("data.json", json.dumps({"dataset_param": None}), "not an object"),
        ("model.json", "3", "not an object"),
        ("model.json", json.dumps(MODEL | {"text_decoder": None}), "not an object"),
        ("model.json", json.dumps(MODEL | {"frozen": True}), "unknown keys"),
        ("model.json", json.dumps(MODEL | {"text_decoder": {"freezes": True}}), "unknown keys"),
        ("model.json", json.dumps(MODEL | {"text_decoder": {"freeze": "yes"}}), "true or false"),
        ("fsdp2.yaml", "- sharding_size\n", "not a mapping"),
        ("fsdp2.yaml", "num_to_forward_prefetch: 2\n", "no counterpart"),
        ("fsdp2.yaml", "ignored_modules: [visual]\n", "no counterpart"),
        ("fsdp2.yaml", "param_dtype: [bf16]\n", "unknown number format"),
    ],
)
def test_files_without_a_counterpart_are_refused(files: Path, file: str, text: str, message: str) -> None:
    (files / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        fsdp2_recipe(call(files))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (SCRIPT + " --no-such-flag 3", "unknown flag"),
        (
            SCRIPT.replace("--tensor-model-parallel-size 1", "--tensor-model-parallel-size 2"),
            "data-parallel only",
        ),
        (SCRIPT.replace("--lr 1.0e-5", "--lr high"), "not a number"),
        (SCRIPT.replace("--lr 1.0e-5", ""), "a flag is missing"),
        (
            SCRIPT.replace("--calculate-per-token-loss", "").replace("batch-size 1 ", "batch-size 2 "),
            "mean over micro-batches",
        ),
        (SCRIPT.replace("--train-iters 10000 ", ""), "expected: --train-iters"),
        (SCRIPT.replace("--micro-batch-size 1", "--micro-batch-size 0"), "--micro-batch-size"),
        (SCRIPT + " --lr-warmup-iters 5", "exclude each other"),
        (SCRIPT + " --no-save-optim false", "takes no value"),
        (SCRIPT + " --eval-iters often", "not a number"),
    ],
)
def test_flags_without_a_counterpart_are_refused(files: Path, script: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fsdp2_recipe(call(files, script=script))
