# SPDX-License-Identifier: Apache-2.0
"""Whole models whose layers take the short way, kernels interpreted, against transformers and across processes."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from models.common import fp8_products
from models.common.dense_layer import DenseLayer
from models.common.settings import ModelSettings
from models.contract.memory import estimate_memory
from models.contract.recipe import parse_recipe
from models.parity.oracles import TINY, architecture_of, build_oracle
from models.parity.single import LIMITS, make_pair, measure_rounding
from tests.models.common.fp8_layers import cpu_rounding
from tests.models.common.short_way import short_way_everywhere

pytestmark = pytest.mark.usefixtures("single_process")


NUM_POSITIONS = 16


class KeepsInputsAndOutput(torch.autograd.Function):
    """Stands for flash attention, which keeps these for its backward pass, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.flatten(2).clone()
        ctx.save_for_backward(query, key, value, out)
        return out


def keeps_inputs_and_output(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return KeepsInputsAndOutput.apply(query, key, value)


def short_layers(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, DenseLayer) and layer._is_short]


@pytest.mark.slow  # interpreted kernels are slow
@pytest.mark.parametrize(("name", "changes"), [
    *((name, {}) for name in TINY),
    ("qwen3_vl", {"recompute": "full", "recompute_num_layers": 1, "recompute_vision": True}),
    ("qwen3_vl", {"recompute": "selective"}),
    ("qwen2_5_vl", {"recompute": "selective"}),
])  # fmt: skip
def test_model_equals_transformers(name: str, changes: dict[str, Any]) -> None:
    with short_way_everywhere():
        pair = make_pair(name, ModelSettings(moe_aux_loss_coeff=0.0, **changes))
    towers: list[Any] = [*pair.model.vision_model.layers, *pair.model.language_model.decoder.layers]
    assert short_layers(pair.model) == [layer for layer in towers if isinstance(layer.mlp, MLP)]
    made, reference = pair.case("mixed")
    found = measure_rounding(pair, made, reference, gradient_floor=LIMITS["fp32"].gradient_floor)
    assert found.dictated.num_gradients == len(pair.rules)
    assert not found.exceeding(LIMITS["fp32"]), str(found)


def test_what_a_layer_puts_out_is_no_view() -> None:
    with short_way_everywhere():
        model = make_pair("qwen2_5_vl").model
    layer = short_layers(model.language_model)[0]
    states = torch.randn(6, 1, layer.config.hidden_size, requires_grad=True)
    angles = torch.zeros(6, 1, 1, layer.config.kv_channels)
    out = layer(states, attention_mask=None, rotary_pos_emb=angles)[0]
    assert out._base is None  # pipeline stages free what they sent on
    assert out.requires_grad


def one_layer(name: str, **changes: Any) -> tuple[Any, Tensor, Tensor]:
    """A decoder layer that takes the short way, hidden states [s, b, h] and angles for it."""
    with short_way_everywhere():
        model = make_pair(name, ModelSettings(moe_aux_loss_coeff=0.0, **changes)).model
    layer = short_layers(model.language_model)[0]
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(NUM_POSITIONS, 1, layer.config.hidden_size, generator=generator, requires_grad=True)
    return layer, states, torch.randn(NUM_POSITIONS, 1, 1, layer.config.kv_channels, generator=generator)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_selective_recompute_changes_no_gradient(name: str) -> None:
    found = []
    for recompute in ("none", "selective"):
        layer, states, angles = one_layer(name, recompute=recompute)
        layer.zero_grad()
        layer(states, attention_mask=None, rotary_pos_emb=angles)[0].square().sum().backward()
        found.append({**{key: p.grad for key, p in layer.named_parameters()}, "states": states.grad})
    kept, recomputed = found
    assert all(torch.equal(recomputed[key], value) for key, value in kept.items())
    assert all(value.abs().sum() > 0 for value in kept.values())


@pytest.mark.parametrize("fp8", [None, "tensorwise"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_plan_counts_what_a_layer_keeps(
    name: str, recompute: str, fp8: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_products, "te_rounding", cpu_rounding)
    layer, states, angles = one_layer(name, recompute=recompute, fp8=fp8)
    for linear in layer._linears:
        linear.is_first_microbatch = True
    layer.self_attention.core_attention.forward = keeps_inputs_and_output
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(states, attention_mask=None, rotary_pos_emb=angles)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (angles, *layer.parameters())}
    statistics = NUM_POSITIONS * 4
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in shared]
    found = sum(size for size in sizes if size > statistics)
    recipe = parse_recipe(
        {
            "name": "one-layer", "num_processes": 1,
            "model": {"family": name, "checkpoint": "none", "freeze": ["vision"], "num_layers": 1},
            "data": {"dataset": "mock", "seq_length": NUM_POSITIONS},
            "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1}, "optimizer": {"lr": 1e-3},
            "precision": {"dtype": "fp32", "recompute": recompute, "fp8": fp8},
        },
        where="test",
    )  # fmt: skip
    assert estimate_memory(recipe, architecture_of(name, build_oracle(name))).activations == found


@pytest.mark.parametrize("changes", [{"fp8": "delayed"}])
def test_short_way_is_closed_where_it_does_not_lead(changes: dict[str, Any]) -> None:
    with short_way_everywhere():
        model = make_pair("qwen2_5_vl", ModelSettings(moe_aux_loss_coeff=0.0, **changes)).model
    assert not short_layers(model.language_model)
    assert short_layers(model.vision_model)
