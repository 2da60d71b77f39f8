# SPDX-License-Identifier: Apache-2.0
"""A layer on our kernels, interpreted, against the same layer on plain modules."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from models.common.fused_layers import FusedSelfAttention, ResidualRMSNorm
from models.common.settings import ModelSettings
from models.common.specs import layer_spec
from models.common.transformer_configs import decoder_config, vision_config
from models.parity.oracles import architecture_of, build_oracle


def build(name: str, tower: str, *, is_fused: bool) -> torch.nn.Module:
    """One layer of a tiny model with torch's linear layers; `is_fused` puts our norms and attention around them."""
    architecture = architecture_of(name, build_oracle(name))
    settings = ModelSettings(moe_aux_loss_coeff=0.0)
    is_text = tower == "text"
    config = (
        decoder_config(architecture.text, settings)
        if is_text
        else vision_config(architecture.vision, settings)
    )
    spec: Any = layer_spec(config, "torch", is_causal=is_text)
    if is_fused:
        attention = dataclasses.replace(spec.submodules.self_attention, module=FusedSelfAttention)
        norms: dict[str, Any] = {}
        if config.normalization == "RMSNorm":
            norms = {"input_layernorm": ResidualRMSNorm, "pre_mlp_layernorm": ResidualRMSNorm}
        spec.submodules = dataclasses.replace(spec.submodules, self_attention=attention, **norms)
    layer = build_module(spec, config=config, layer_number=1, add_layer_offset=False)
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


@pytest.mark.parametrize(("name", "tower"), [
    ("qwen2_5_vl", "text"), ("qwen2_5_vl", "vision"), ("qwen3_vl", "text"), ("qwen3_vl", "vision"),
])  # fmt: skip
@pytest.mark.usefixtures("single_process")
def test_fused_layer_equals_plain_layer(name: str, tower: str) -> None:
    rows = 2 if tower == "text" else 1
    plain = run(build(name, tower, is_fused=False), 11, rows)
    fused = run(build(name, tower, is_fused=True), 11, rows)
    assert len(plain) == 2 + sum(1 for _ in build(name, tower, is_fused=False).parameters())
    torch.testing.assert_close(fused, plain, atol=2e-4, rtol=1e-4)
