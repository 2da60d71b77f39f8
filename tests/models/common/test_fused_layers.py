# SPDX-License-Identifier: Apache-2.0
"""A layer on our kernels, interpreted, against the same layer on plain modules."""

from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from models.common.dense_layer import DenseLayer, mlp_activation
from models.common.settings import ModelSettings
from models.common.specs import layer_spec
from models.common.transformer_configs import decoder_config, vision_config
from models.parity.oracles import architecture_of, build_oracle
from tests.models.common.short_way import with_our_modules


def build(name: str, tower: str, kind: Literal["plain", "modules", "dense"]) -> torch.nn.Module:
    """One layer of a tiny model with torch's linear layers, on plain modules, on ours, or the short way past them."""
    architecture = architecture_of(name, build_oracle(name))
    settings = ModelSettings(moe_aux_loss_coeff=0.0)
    is_text = tower == "text"
    config = (
        decoder_config(architecture.text, settings)
        if is_text
        else vision_config(architecture.vision, settings)
    )
    spec: Any = layer_spec(config, "torch", is_causal=is_text)
    if kind != "plain":
        spec = with_our_modules(spec, config)
    if kind == "dense":
        spec.module = DenseLayer
    layer: Any = build_module(spec, config=config, layer_number=1, add_layer_offset=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.2 + 0.5 * (parameter.ndim == 1)
            )
    return layer


def run(layer: torch.nn.Module, length: int, rows: int) -> list[Tensor]:
    """Output and every gradient."""
    config: Any = layer.config
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(length, rows, config.hidden_size, generator=generator).requires_grad_()
    half = torch.rand(length, rows, 1, config.kv_channels // 2, generator=generator) * 30
    angles = torch.cat((half, half), dim=-1)
    out = layer(states, attention_mask=None, rotary_pos_emb=angles)[0]
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    gradients = [states.grad, *(parameter.grad for parameter in layer.parameters())]
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


TOWERS = [("qwen2_5_vl", "text"), ("qwen2_5_vl", "vision"), ("qwen3_vl", "text"), ("qwen3_vl", "vision")]


@pytest.mark.parametrize("kind", ["modules", "dense"])
@pytest.mark.parametrize(("name", "tower"), TOWERS)
@pytest.mark.usefixtures("single_process")
def test_fused_layer_equals_plain_layer(name: str, tower: str, kind: Literal["modules", "dense"]) -> None:
    rows = 2 if tower == "text" else 1
    plain = run(build(name, tower, "plain"), 11, rows)
    fused = run(build(name, tower, kind), 11, rows)
    assert len(plain) == 2 + sum(1 for _ in build(name, tower, "plain").parameters())
    torch.testing.assert_close(fused, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "tower"), TOWERS)
@pytest.mark.usefixtures("single_process")
def test_short_way_adds_to_main_gradients_as_megatron_does(name: str, tower: str) -> None:
    _, _, *gradients = run(build(name, tower, "plain"), 11, 1)
    layer: Any = build(name, tower, "dense")
    parameters: list[Any] = [*layer.parameters()]
    for parameter in parameters:
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones_like(parameter), False
    run(layer, 11, 1)
    run(layer, 11, 1)
    assert all(parameter.grad_added_to_main_grad and parameter.grad is not None for parameter in parameters)
    sums = [parameter.main_grad for parameter in parameters]
    torch.testing.assert_close(sums, [1 + 2 * gradient for gradient in gradients], atol=4e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "tower"), [("qwen2_5_vl", "vision"), ("qwen3_vl", "text")])
@pytest.mark.parametrize("frozen", ["norm", "linear_fc1", "linear_qkv", "bias", ""])
@pytest.mark.usefixtures("single_process")
def test_short_way_leaves_frozen_parameters_alone(name: str, tower: str, frozen: str) -> None:
    layers = [build(name, tower, "plain"), build(name, tower, "dense")]
    for layer in layers:
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(frozen not in key)
    plain, short = (run(layer, 11, 1) for layer in layers)
    torch.testing.assert_close(short, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("single_process")
def test_short_way_waits_for_weights_and_gives_way_to_observers() -> None:
    layer: Any = build("qwen3_vl", "text", "dense")
    seen: list[str] = []
    owners = [
        module for module in layer.modules() if next(module.parameters(recurse=False), None) is not None
    ]
    for module in owners:  # as megatron-core's data parallelism does
        module.register_forward_pre_hook(lambda module, _: seen.append(module))
    run(layer, 5, 1)
    assert sorted(map(id, seen)) == sorted(map(id, owners))
    outputs: list[Tensor] = []
    layer.mlp.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    run(layer, 5, 1)
    assert len(outputs) == 1
    assert len(seen) == 2 * len(owners)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gated_linear_unit": True, "activation_func": F.silu}, "swiglu"),
        ({"gated_linear_unit": True, "activation_func": F.gelu}, None),
        ({"activation_func": F.gelu}, "gelu"),
        ({"activation_func": F.gelu, "bias_activation_fusion": True}, "gelu_tanh"),
        ({"activation_func": partial(F.gelu, approximate="tanh")}, "gelu_tanh"),
        ({"activation_func": F.relu}, None),
    ],
)
def test_activation_is_read_from_the_config(changes: dict[str, Any], expected: str | None) -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, add_bias_linear=True, **changes
    )
    assert mlp_activation(config) == expected
