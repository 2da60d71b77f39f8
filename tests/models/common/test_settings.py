# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch

from models.common.settings import resolve_attention_backend, resolve_experts_backend, settings_from_recipe
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, parse_recipe


def recipe(**sections: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "name": "case",
        "model": {"family": "qwen3_vl", "checkpoint": "x"},
        "data": {"dataset": "x", "seq_length": 64},
        "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "optimizer": {"lr": 1e-5},
    }
    return parse_recipe({key: data.get(key, {}) | sections.get(key, {}) if key != "name" else "case"
                         for key in data | sections}, where="test")  # fmt: skip


def test_settings_carry_the_recipe_over() -> None:
    settings = settings_from_recipe(
        recipe(precision={"dtype": "fp16", "recompute": "full"}, data={"padding": "longest"}), device="cpu"
    )
    assert settings.dtype == torch.float16
    assert settings.recompute == "full"
    assert settings.variable_seq_lengths
    assert settings.attention_backend == "torch"


def test_fp8_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        settings_from_recipe(recipe(precision={"fp8": "tensorwise"}), device="cpu")


def test_grouped_experts_need_the_kernels_of_a_gpu() -> None:
    with pytest.raises(ConfigError, match="experts_backend 'grouped' cannot run here") as error:
        settings_from_recipe(recipe(model={"experts_backend": "grouped"}), device="cpu")
    assert "use experts_backend = 'te' or 'auto'" in str(error.value)
    assert settings_from_recipe(recipe(), device="cpu").experts_backend == "te"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"precision": {"dtype": "bf16"}}, "grouped"),
        ({"precision": {"dtype": "bf16"}, "model": {"experts_backend": "te"}}, "te"),
        ({"precision": {"dtype": "bf16"}, "model": {"attention_backend": "torch"}}, "te"),
        ({"precision": {"dtype": "fp16"}}, "te"),
        ({"precision": {"dtype": "bf16", "fp8": "blockwise"}}, "te"),
        ({"precision": {"dtype": "bf16"}, "parallel": {"expert_tensor_parallel_size": 2}}, "te"),
        ({"precision": {"dtype": "bf16"}, "train": {"engine": "fsdp2"}}, "te"),
    ],
)
def test_auto_takes_experts_in_one_launch_where_there_is_a_kernel(
    sections: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    assert resolve_experts_backend(recipe(**sections), "cuda") == expected
    assert resolve_experts_backend(recipe(**sections), "cpu") == "te"


def test_te_on_a_cpu_is_refused_and_auto_takes_torch() -> None:
    assert resolve_attention_backend("auto", "cpu") == "torch"
    with pytest.raises(ConfigError, match="attention_backend 'te' cannot run here") as error:
        resolve_attention_backend("te", "cpu")
    assert "use attention_backend = 'torch' or 'auto'" in str(error.value)
