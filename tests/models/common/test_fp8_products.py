# SPDX-License-Identifier: Apache-2.0
"""A layer's products in fp8, rounded on a CPU as TransformerEngine does it on a GPU (tests/models/test_gpu_fp8.py)."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.common import fp8_products
from models.common.fp8_products import Fp8Products
from models.common.layer_products import activate
from models.common.settings import ModelSettings
from models.common.specs import takes_own_kernels
from tests.models.common.fp8_layers import SIZES, Rounded, cpu_rounding, decoder_layer
from tests.models.common.short_way import short_way_spec

NUM_ROWS = 32
FP8 = 0.15
"""How far gradients may be off: two bits of mantissa are off by an eighth at most."""


def counting(counts: list[int]) -> Any:
    """Rounding that counts the weights it rounds."""
    rounding = cpu_rounding()

    def weights(matrix: Tensor) -> Any:
        counts[0] += 1
        return rounding.weights(matrix)

    return dataclasses.replace(rounding, weights=weights)


def made_linear(num_out: int = 24, num_in: int = 16) -> Any:
    """What stands for TransformerEngine's linear layer, at the start of a step."""
    linear: Any = nn.Linear(num_in, num_out)
    linear.is_first_microbatch = True
    return linear


@pytest.fixture
def layer_of(single_process: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a decoder layer that takes the short way, with weights that are the same each time."""
    monkeypatch.setattr(fp8_products, "te_rounding", cpu_rounding)

    def make(name: str = "qwen3_vl", **changes: Any) -> Any:
        layer = decoder_layer(name, ModelSettings(**changes), short_way_spec)
        assert layer._is_short
        generator = torch.Generator().manual_seed(7)
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * 0.05 if parameter.ndim > 1 else 1 + noise * 0.1)
        for module in layer._linears:
            module.is_first_microbatch = True
        return layer

    return make


def run(layer: Any, num_rows: int = NUM_ROWS) -> dict[str, Tensor]:
    """Output and gradients of a layer."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(num_rows, 1, SIZES.hidden_size, generator=generator, requires_grad=True)
    angles = torch.rand(num_rows, 1, 1, SIZES.kv_channels, generator=generator)
    layer.zero_grad()
    out = layer(states, attention_mask=None, rotary_pos_emb=angles)[0]
    out.backward(torch.randn(out.shape, generator=generator))
    assert out._base is None  # pipeline stages free what they sent on
    gradients = {key: value.grad for key, value in layer.named_parameters() if value.grad is not None}
    return {"out": out.detach(), "states": states.grad, **gradients}  # type: ignore[dict-item]


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_products_are_those_of_what_was_rounded() -> None:
    linear, products = made_linear(), Fp8Products(cpu_rounding())
    weight, bias = linear.weight, linear.bias
    products.begin([linear])
    rows, d_out = torch.randn(32, 16), torch.randn(32, 24)
    operand, d_operand = products.operand(rows), products.gradient(d_out)
    assert operand.by_row.dtype == torch.float8_e4m3fn
    assert d_operand.by_row.dtype == torch.float8_e5m2
    rounded = [value.along("by_row") for value in (operand, d_operand, products._weights[id(weight)])]
    x, g, w = rounded
    assert all(
        0 < distance(ours, exact) < 0.1 for ours, exact in zip(rounded, (rows, d_out, weight), strict=True)
    )
    residual = torch.randn(32, 1, 24)
    assert torch.allclose(
        products.linear_onto(residual, operand, weight, bias), residual + (x @ w.t() + bias)[:, None]
    )
    assert operand.by_row is None, "what only the forward pass takes is let go of"
    assert torch.allclose(products.input_gradient(d_operand, weight), g @ w)
    d_weight = products.weight_gradient(weight, d_operand, operand)
    assert d_weight is not None
    assert torch.allclose(d_weight, g.t() @ x)


def test_gradients_go_to_the_main_ones() -> None:
    linear, products = made_linear(), Fp8Products(cpu_rounding())
    products.begin([linear])
    weight = linear.weight
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    operand, d_operand = products.operand(torch.randn(32, 16)), products.gradient(torch.randn(32, 24))
    wanted = 1 + d_operand.along("by_row").t() @ operand.along("by_row")
    products.weight_gradient(weight, d_operand, operand)
    assert torch.allclose(weight.main_grad, wanted)
    assert weight.grad_added_to_main_grad
    weight.requires_grad_(False)
    assert products.weight_gradient(weight, d_operand, operand) is None


def test_weights_are_rounded_once_a_step() -> None:
    counts = [0]
    linear, products = made_linear(), Fp8Products(counting(counts))
    for _ in range(3):
        products.begin([linear])
    assert counts == [1]
    linear.weight.data.mul_(2)
    linear.is_first_microbatch = True
    products.begin([linear])
    assert counts == [2]
    assert distance(products._weights[id(linear.weight)].along("by_row"), linear.weight.detach()) < 0.1


@pytest.mark.parametrize("has_bias", [False, True])
def test_activation_that_notes_its_largest_value_is_taken(has_bias: bool) -> None:
    """Not for the gradient where a bias wants the sum of what is not rounded."""
    calls: list[str] = []

    def swiglu(inner: Tensor, rows: Any) -> Any:
        calls.append("forward")
        return rows(activate(inner, "swiglu"))

    def swiglu_backward(gradient: Tensor, inner: Tensor, gradients: Any) -> Any:
        calls.append("backward")
        return gradients(torch.cat([gradient, gradient], dim=1))

    rounding = dataclasses.replace(cpu_rounding(), swiglu=swiglu, swiglu_backward=swiglu_backward)
    products = Fp8Products(rounding)
    inner = torch.randn(16, 32)
    operand = products.activate(inner, "swiglu")
    assert distance(operand.along("by_row"), activate(inner, "swiglu")) < 0.1
    bias = nn.Parameter(torch.zeros(32)) if has_bias else None
    _, d_bias = products.activation_gradient(torch.randn(16, 16), inner, "swiglu", bias)
    assert calls == (["forward"] if has_bias else ["forward", "backward"])
    assert (d_bias is not None) == has_bias
    products.activate(inner, "gelu")
    assert len(calls) == 1 + (not has_bias)


def test_what_is_kept_is_let_go_of_with_the_backward_pass() -> None:
    products, ctx = Fp8Products(cpu_rounding()), SimpleNamespace(operands=None)
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    rows, operand = torch.randn(16, 16), products.operand(torch.randn(16, 8))
    inside = operand.by_column
    products.save(ctx, rows, None, operand)
    assert isinstance(operand, Rounded)
    assert operand.by_column is None, "held where autograd cannot let go of it"
    found, nothing, restored = products.saved(ctx)
    assert found is rows
    assert nothing is None
    assert restored.by_column is inside
    assert ctx.operands is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_layer_is_off_by_rounding(name: str, layer_of: Any) -> None:
    exact, found = run(layer_of(name)), run(layer_of(name, fp8="tensorwise"))
    assert found.keys() == exact.keys()
    distances = {key: distance(found[key], exact[key]) for key in exact}
    assert max(distances.values()) < FP8, distances
    assert min(distances.values()) > 1e-3, distances  # every product is of what was rounded


def test_layer_computes_again_what_it_did_not_keep(layer_of: Any) -> None:
    kept = run(layer_of(fp8="tensorwise"))
    recomputed = run(layer_of(fp8="tensorwise", recompute="selective"))
    assert all(torch.equal(recomputed[key], value) for key, value in kept.items())


def test_frozen_layer_passes_gradients_on(layer_of: Any) -> None:
    layer = layer_of(fp8="tensorwise")
    wanted = run(layer)["states"]
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    found = run(layer)
    assert found.keys() == {"out", "states"}
    assert torch.equal(found["states"], wanted)


def test_rows_that_fp8_does_not_take_go_the_long_way(layer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(fp8="tensorwise")
    monkeypatch.setattr(layer, "_forward", lambda *_: pytest.fail("17 rows are no multiple of 16"))
    torch_linears = run(layer, num_rows=17)
    assert torch_linears["out"].shape[0] == 17


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_scales_that_need_no_history_take_our_kernels(fp8: Any, layer_of: Any) -> None:
    layer = layer_of(fp8=fp8)
    assert takes_own_kernels(layer.config)
    assert isinstance(layer._products, Fp8Products)


def test_scales_with_a_history_stay_with_their_modules(layer_of: Any) -> None:
    layer = decoder_layer("qwen3_vl", ModelSettings(fp8="delayed"), short_way_spec)
    assert not takes_own_kernels(layer.config)
    assert not layer._is_short
    assert not isinstance(layer_of()._products, Fp8Products)
