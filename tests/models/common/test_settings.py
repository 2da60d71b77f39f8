# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.common.settings import (
    resolve_attention_backend,
    resolve_experts_backend,
    resolve_token_dispatcher,
    settings_from_recipe,
    with_experts_backend,
    with_token_dispatcher,
)
from models.contract.errors import ConfigError
from models.contract.families import published_architecture
from models.contract.recipe import Recipe, parse_recipe

EP4 = {"expert_model_parallel_size": 4}
TP4 = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
LONGEST = {"padding": "longest"}


def recipe(num_processes: int = 1, **sections: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "name": "case",
        "num_processes": num_processes,
        "model": {"family": "qwen3_vl", "checkpoint": "x"},
        "data": {"dataset": "x", "seq_length": 64},
        "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": num_processes},
        "optimizer": {"lr": 1e-5},
    }
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section
    return parse_recipe(data, where="test")


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


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_fp8_without_transformer_engine_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend, which takes over, would train in bf16 what is recorded as fp8."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = recipe(precision={"dtype": "bf16", "fp8": "tensorwise"}, model={"attention_backend": backend})
    with pytest.raises(ConfigError, match="fp8 needs TransformerEngine's layers"):
        settings_from_recipe(asked, device="cuda")


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


@pytest.mark.parametrize(
    ("parallel", "topk", "others", "expected"),
    [
        # 3 rows a token instead of 6
        (EP4, 8, {}, "allgather"),
        (EP4, 8, {"data": {"packing": True}}, "allgather"),
        ({"expert_model_parallel_size": 2}, 8, {}, "allgather"),
        ({"expert_model_parallel_size": 2}, 3, {}, "allgather"),
        # as many rows, or more
        ({"expert_model_parallel_size": 2}, 2, {}, "alltoall"),
        (EP4, 4, {}, "alltoall"),
        (EP4, 2, {}, "alltoall"),
        ({"expert_model_parallel_size": 8}, 8, {}, "alltoall"),
        # nobody to send to
        ({}, 8, {}, "alltoall"),
        ({"expert_model_parallel_size": 1}, 8, {}, "alltoall"),
        # experts are shared by all of their tensor-parallel ranks, which are the other layers' if nothing is said
        (TP4 | EP4 | {"expert_tensor_parallel_size": 1}, 8, {}, "allgather"),
        (TP4, 8, {}, "allgather"),
        (TP4 | {"expert_model_parallel_size": 2}, 8, {}, "alltoall"),
        (EP4 | {"expert_tensor_parallel_size": 2}, 8, {}, "alltoall"),
        (EP4 | {"expert_tensor_parallel_size": 2}, 9, {}, "allgather"),
        ({"pipeline_model_parallel_size": 2} | EP4, 8, {}, "allgather"),
        ({"context_parallel_size": 2} | EP4, 8, {}, "allgather"),
        # rows of another length on another data-parallel rank
        (EP4, 8, {"data": LONGEST}, "alltoall"),
        ({"context_parallel_size": 2} | EP4, 8, {"data": LONGEST}, "alltoall"),
        ({"expert_tensor_parallel_size": 4}, 8, {"data": LONGEST}, "alltoall"),
        # parts of the same rows
        ({"context_parallel_size": 4} | EP4, 8, {"data": LONGEST}, "allgather"),
        (TP4 | EP4 | {"expert_tensor_parallel_size": 1}, 8, {"data": LONGEST}, "allgather"),
        (TP4, 8, {"data": LONGEST}, "allgather"),
        # what pads the rows of experts, and what has no dispatcher
        (EP4, 8, {"precision": {"fp8": "blockwise"}}, "alltoall"),
        (EP4, 8, {"train": {"engine": "fsdp2"}}, "alltoall"),
    ],
)
def test_auto_gathers_tokens_where_that_sends_less_and_all_have_as_many(
    parallel: dict[str, Any], topk: int, others: dict[str, Any], expected: str
) -> None:
    experts = published_architecture("qwen3_vl_30b_a3b")
    assert experts.text.moe is not None
    moe = replace(experts.text.moe, topk=topk)
    architecture = replace(experts, text=replace(experts.text, moe=moe))
    assert resolve_token_dispatcher(recipe(8, parallel=parallel, **others), architecture) == expected
    for named in ("alltoall", "allgather"):
        chosen = recipe(8, parallel=parallel | {"moe_token_dispatcher_type": named}, **others)
        assert resolve_token_dispatcher(chosen, architecture) == named


@pytest.mark.parametrize("named", ["auto", "allgather"])
def test_tokens_of_a_dense_model_go_nowhere(named: str) -> None:
    dense = published_architecture("qwen3_vl_8b")
    given = recipe(8, parallel=TP4 | {"moe_token_dispatcher_type": named})
    assert resolve_token_dispatcher(given, dense) == "alltoall"


def test_run_knows_whose_experts_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    auto = recipe(1, model={"attention_backend": "auto"}, precision={"dtype": "bf16"})
    experts, dense = (published_architecture(name) for name in ("qwen3_vl_30b_a3b", "qwen3_vl_8b"))
    found = [
        with_experts_backend(auto, sizes, device).model.experts_backend
        for sizes, device in ((experts, "cuda"), (experts, "cpu"), (dense, "cuda"))
    ]
    assert found == ["grouped", "te", "te"]


def test_settings_have_the_dispatcher_that_was_resolved_or_the_one_that_works_everywhere() -> None:
    auto, experts = recipe(8, parallel=EP4), published_architecture("qwen3_vl_30b_a3b")
    resolved = with_token_dispatcher(auto, experts)
    assert resolved.parallel == auto.parallel.model_copy(update={"moe_token_dispatcher_type": "allgather"})
    assert resolved.model_copy(update={"parallel": auto.parallel}) == auto
    found = [
        settings_from_recipe(given, device="cpu").moe_token_dispatcher_type for given in (resolved, auto)
    ]
    assert found == ["allgather", "alltoall"]


def test_te_on_a_cpu_is_refused_and_auto_takes_torch() -> None:
    assert resolve_attention_backend("auto", "cpu") == "torch"
    with pytest.raises(ConfigError, match="attention_backend 'te' cannot run here") as error:
        resolve_attention_backend("te", "cpu")
    assert "use attention_backend = 'torch' or 'auto'" in str(error.value)
