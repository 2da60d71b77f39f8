# SPDX-License-Identifier: Apache-2.0
"""Decoder layers as wide as fp8 wants them, and rounding to fp8 as TransformerEngine does it, for a CPU."""

import dataclasses
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from models.common.fp8_products import Rounding
from models.common.settings import ModelSettings
from models.common.specs import layer_spec
from models.common.transformer_configs import decoder_config
from models.contract.architecture import TextArchitecture

SIZES = TextArchitecture(
    num_layers=1, hidden_size=256, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=64,
    vocab_size=160, rotary_base=1e4, mrope_section=(8, 12, 12), mrope_interleaved=False, layernorm_epsilon=1e-6,
    add_qkv_bias=True, qk_layernorm=False, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = {
    "qwen2_5_vl": SIZES,
    "qwen3_vl": dataclasses.replace(SIZES, add_qkv_bias=False, qk_layernorm=True, mrope_interleaved=True),
}


def decoder_layer(name: str, settings: ModelSettings, make_spec: Any = layer_spec) -> Any:
    """One decoder layer of a family."""
    config = decoder_config(FAMILIES[name], settings)
    spec = make_spec(config, settings.attention_backend, is_causal=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer: Any = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    return layer.to(settings.device)


class Rounded:
    """A matrix in fp8 with one scale, and again for products along its columns."""

    def __init__(self, matrix: Tensor, format: torch.dtype) -> None:
        scale = torch.finfo(format).max / matrix.abs().amax().clamp(min=1e-12)
        self.by_row: Tensor | None = (matrix * scale).to(format)
        self.by_column: Tensor | None = self.by_row.t().contiguous()
        self.scale: Tensor | None = scale

    def update_usage(self, *, rowwise_usage: bool, columnwise_usage: bool) -> None:
        self.by_row = self.by_row if rowwise_usage else None
        self.by_column = self.by_column if columnwise_usage else None

    def prepare_for_saving(self) -> tuple[list[Tensor | None], "Rounded"]:
        inside = [self.by_row, self.by_column, self.scale]
        self.by_row = self.by_column = self.scale = None
        return inside, self

    def restore_from_saved(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        self.by_row, self.by_column, self.scale = tensors[:3]
        return tensors[3:]

    def along(self, name: str) -> Tensor:
        """[m, k] as a product takes it, whose inner dimension is the last."""
        inside = getattr(self, name)
        assert inside is not None, f"{name} was let go of"
        assert self.scale is not None
        return inside.float() / self.scale


def multiply(
    left: Rounded, right: Rounded, *, layout: str = "TN", out: Tensor | None = None, accumulate: bool = False,
    out_dtype: torch.dtype, bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor]:  # fmt: skip
    """TransformerEngine's `general_gemm`, whose letters are cuBLAS's: right [m, k] times left [n, k], transposed."""
    sides = {"TN": ("by_row", "by_row"), "NN": ("by_column", "by_row"), "NT": ("by_column", "by_column")}[
        layout
    ]
    product = right.along(sides[1]) @ left.along(sides[0]).t()
    product = product if bias is None else product + bias
    if out is None:
        return (product.to(out_dtype),)
    out.copy_(out + product if accumulate else product)
    return (out,)


def cpu_rounding(_: TransformerConfig | None = None) -> Rounding:
    """One scale a matrix; gradients in the format with more exponents."""
    return Rounding(
        rows=lambda matrix: Rounded(matrix, torch.float8_e4m3fn),
        weights=lambda matrix: Rounded(matrix, torch.float8_e4m3fn),
        gradients=lambda matrix: Rounded(matrix, torch.float8_e5m2),
        multiply=multiply,
        is_exact=(False, True),
    )
