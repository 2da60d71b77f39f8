# SPDX-License-Identifier: Apache-2.0
"""A dense transformer layer as two autograd functions around the attention core.

    norm, joined projection, split, heads' norms, rotation      -> queries, keys, values
    attention core
    projection, residual, norm, MLP, residual                   -> the layer's output

One by one, with megatron-core's and TransformerEngine's modules, a layer costs the CPU about eight milliseconds forward
and backward (a Xeon beside an H100), more than the GPU needs for a layer of a vision tower: it waits for launches.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from models.common.fp8_products import products_of
from models.common.fused_layers import FusedSelfAttention, is_watched, norm_weight, wait_for_weights
from models.common.kernels.norm import NormStatistics, norm_backward, norm_forward
from models.common.kernels.products import bias_gradient, vector_gradients
from models.common.kernels.qkv import HeadSizes, needed_backward, split_backward, split_forward
from models.common.layer_products import Products
from models.common.specs import takes_own_kernels


class DenseLayer(TransformerLayer):
    """TransformerLayer that takes the short way where one is open to it, with the same parameters and results.

    Open: on our kernels, on one tensor-parallel rank, for a dense MLP, while nobody watches the modules inside, and in
    fp8 where its scales need no history. Selective recompute keeps neither what the norms nor what the MLP's activation
    put out.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        mlp: Any = self.mlp
        attention: Any = self.self_attention
        self._activation = mlp_activation(config)
        self._is_short = (
            isinstance(attention, FusedSelfAttention)
            and isinstance(mlp, MLP)
            and self._activation is not None
            and self.pg_collection.tp.size() == 1
            and takes_own_kernels(config)
        )
        if self._is_short:
            self._products = products_of(config)
            self._linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
            self._keeps = config.recompute_granularity != "selective"
            parts = (
                self.input_layernorm, attention.linear_qkv, attention.q_layernorm, attention.k_layernorm,
                attention.linear_proj, self.pre_mlp_layernorm, mlp.linear_fc1, mlp.linear_fc2,
            )  # fmt: skip
            self._owners = [part for part in parts if part is not None]
            self._sizes = HeadSizes(
                attention.num_query_groups_per_partition,
                attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition,
                attention.hidden_size_per_attention_head,
                config.layernorm_epsilon,
            )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the layer; see TransformerLayer.

        Args:
            hidden_states: [s, b, h].
            args: As TransformerLayer takes them.
            kwargs: As TransformerLayer takes them.

        Returns: [s, b, h] and `context`.
        """
        angles: Any = kwargs.get("rotary_pos_emb")
        is_plain = isinstance(angles, Tensor) and kwargs.get("inference_context") is None
        if not (self._is_short and is_plain and self._divides(hidden_states)) or is_watched(
            self.self_attention, self.mlp, *self._owners
        ):
            return cast(Any, super().forward(hidden_states, *args, **kwargs))
        wait_for_weights(*self._owners)
        self._products.begin(self._linears)
        return self._forward(hidden_states, angles, kwargs.get("packed_seq_params")), kwargs.get("context")

    def _divides(self, hidden_states: Tensor) -> bool:
        """Whether there are as many rows as the products' format takes."""
        return hidden_states.shape[:2].numel() % self._products.row_multiple == 0

    def _forward(self, hidden_states: Tensor, angles: Tensor, segments: Any) -> Tensor:
        attention: Any = self.self_attention
        mlp: Any = self.mlp
        query, key, value, residual = cast(
            tuple[Tensor, ...],
            _BeforeAttention.apply(
                hidden_states, angles, *_parameters(self.input_layernorm), *_parameters(attention.linear_qkv),
                norm_weight(attention.q_layernorm), norm_weight(attention.k_layernorm), self._sizes, self._keeps,
                self._products,
            ),
        )  # fmt: skip
        attended = attention.core_attention(
            query, key, value, None,
            attn_mask_type=attention.attn_mask_type, attention_bias=None, packed_seq_params=segments,
        )  # fmt: skip
        out = _AfterAttention.apply(
            attended, residual, *_parameters(attention.linear_proj), *_parameters(self.pre_mlp_layernorm),
            *_parameters(mlp.linear_fc1), *_parameters(mlp.linear_fc2), self._activation,
            self.config.layernorm_epsilon, self._keeps, self._products,
        )  # fmt: skip
        return cast(Tensor, out)


def mlp_activation(config: TransformerConfig) -> str | None:
    """What a config's MLP does between its two products: `swiglu`, `gelu`, `gelu_tanh`, or None for anything else."""
    function = config.activation_func
    if config.gated_linear_unit:
        return "swiglu" if function is F.silu else None
    if isinstance(function, partial) and function.func is F.gelu:
        return "gelu_tanh" if function.keywords == {"approximate": "tanh"} else None
    # megatron-core's fusion of F.gelu with the bias is the tanh approximation
    return ("gelu_tanh" if config.bias_activation_fusion else "gelu") if function is F.gelu else None


def _parameters(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, or None for what a module does not have; past its attributes, which are slow to look up."""
    return module._parameters["weight"], module._parameters.get("bias")


class _BeforeAttention(torch.autograd.Function):
    """[s, b, h] -> queries [s, b, n, d], keys and values [s, b, g, d], and the residual [s, b, h]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        angles: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        sizes: HeadSizes,
        keeps: bool,
        products: Products,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = hidden_states.contiguous().view(-1, hidden_states.shape[-1])
        angles = angles.contiguous()
        normed, statistics = norm_forward(rows, norm_weight, norm_bias, sizes.eps)
        operand = products.operand(normed)
        mixed = products.linear(operand, weight, bias).view(*hidden_states.shape[:2], -1)
        kept = (operand if keeps else None, needed_backward(mixed, query_weight))
        products.save(ctx, rows, *kept, angles, *statistics)
        ctx.parameters = (norm_weight, norm_bias, weight, bias, query_weight, key_weight)
        ctx.sizes, ctx.products = sizes, products
        parts = split_forward(mixed, angles, query_weight, key_weight, sizes)
        return *parts, hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        products: Products = ctx.products
        rows, operand, mixed, angles, *statistics = products.saved(ctx)
        norm_weight, norm_bias, weight, bias, query_weight, key_weight = ctx.parameters
        *d_parts, passed = grad_outputs
        d_mixed, d_heads = split_backward(mixed, angles, query_weight, key_weight, ctx.sizes, d_parts)
        d_out = d_mixed.view(len(rows), -1)
        if operand is None:
            operand = products.operand(norm_forward(rows, norm_weight, norm_bias, ctx.sizes.eps)[0])
        d_operand = products.gradient(d_out)
        d_weight = products.weight_gradient(weight, d_operand, operand)
        d_rows, d_norm_weight, d_norm_bias = norm_backward(
            rows,
            norm_weight,
            NormStatistics(*statistics),
            products.input_gradient(d_operand, weight),
            passed.contiguous().view(rows.shape),
        )
        d_query, d_key = (None, None) if d_heads is None else d_heads
        vectors = (norm_weight, norm_bias, bias, query_weight, key_weight)
        gradients = (d_norm_weight, d_norm_bias, bias_gradient(bias, d_out), d_query, d_key)
        d_norm_weight, d_norm_bias, d_bias, d_query, d_key = vector_gradients(vectors, gradients)
        d_states = d_rows.view(passed.shape)
        return (
            d_states, None, d_norm_weight, d_norm_bias, d_weight, d_bias, d_query, d_key, None, None, None,
        )  # fmt: skip


class _AfterAttention(torch.autograd.Function):
    """What attention put out [s, b, n * d] and the residual [s, b, h] -> the layer's output [s, b, h]."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        residual: Tensor,
        proj: Tensor,
        proj_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        fc1: Tensor,
        fc1_bias: Tensor | None,
        fc2: Tensor,
        fc2_bias: Tensor | None,
        activation: str,
        eps: float,
        keeps: bool,
        products: Products,
    ) -> Tensor:
        heads = products.operand(attended.reshape(-1, attended.shape[-1]))
        middle = products.linear_onto(residual, heads, proj, proj_bias)
        rows = middle.view(-1, middle.shape[-1])
        normed, statistics = norm_forward(rows, norm_weight, norm_bias, eps)
        operand = products.operand(normed)
        inner = products.linear(operand, fc1, fc1_bias)
        activated = products.activate(inner, activation)
        out = products.linear_onto(middle, activated, fc2, fc2_bias)
        kept = (operand, activated) if keeps else (None, None)
        products.save(ctx, heads, rows, inner, *kept, *statistics)
        ctx.parameters = (proj, proj_bias, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias)
        ctx.activation, ctx.eps, ctx.attended_shape, ctx.products = activation, eps, attended.shape, products
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        products: Products = ctx.products
        heads, rows, inner, operand, activated, *statistics = products.saved(ctx)
        proj, proj_bias, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias = ctx.parameters
        shape = grad_outputs[0].shape
        d_out = grad_outputs[0].contiguous().view(rows.shape)
        if operand is None:
            operand = products.operand(norm_forward(rows, norm_weight, norm_bias, ctx.eps)[0])
            activated = products.activate(inner, ctx.activation)
        d_operand = products.gradient(d_out)
        d_fc2 = products.weight_gradient(fc2, d_operand, activated)
        d_activated = products.input_gradient(d_operand, fc2, activated)
        d_operand, d_fc1_bias = products.activation_gradient(d_activated, inner, ctx.activation, fc1_bias)
        d_fc1 = products.weight_gradient(fc1, d_operand, operand)
        d_normed = products.input_gradient(d_operand, fc1)
        d_middle, d_norm_weight, d_norm_bias = norm_backward(
            rows, norm_weight, NormStatistics(*statistics), d_normed, d_out
        )
        d_operand = products.gradient(d_middle)
        d_proj = products.weight_gradient(proj, d_operand, heads)
        d_attended = products.input_gradient(d_operand, proj).view(ctx.attended_shape)
        vectors = (proj_bias, norm_weight, norm_bias, fc1_bias, fc2_bias)
        gradients = (
            bias_gradient(proj_bias, d_middle), d_norm_weight, d_norm_bias, d_fc1_bias, bias_gradient(fc2_bias, d_out),
        )  # fmt: skip
        d_proj_bias, d_norm_weight, d_norm_bias, d_fc1_bias, d_fc2_bias = vector_gradients(vectors, gradients)
        return (
            d_attended, d_middle.view(shape), d_proj, d_proj_bias, d_norm_weight, d_norm_bias,
            d_fc1, d_fc1_bias, d_fc2, d_fc2_bias, None, None, None, None,
        )  # fmt: skip
