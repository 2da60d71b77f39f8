# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer as one autograd function: both products and the activation between them for all experts.

    rows [t, h] -> fc1 -> [t, 2f] -> SwiGLU times the router's weight of the row -> [t, f] -> fc2 -> [t, h]

megatron-core's experts with TransformerEngine's linear layers launch a product for each expert: with 128 of them a
step of Qwen3-VL-30B-A3B waits for the CPU two thirds of its time on an H200.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from models.common.fused_layers import is_watched, wait_for_weights
from models.common.kernels.grouped import (
    as_one,
    grouped_linear,
    grouped_linear_backward,
    grouped_weight_gradients,
)
from models.common.kernels.products import main_grad_of, padded
from models.common.kernels.swiglu import weighted_swiglu_backward, weighted_swiglu_forward
from models.common.specs import ALIGNMENT
from models.common.transfer import to_device

CAPABILITIES = (9, 10)
"""Major compute capabilities of GPUs for which torch has a kernel for products of groups."""


@cache
def with_grouped_products(experts: type[Any]) -> type[Any]:
    """A class of experts that takes the short way where one is open to it, with the same parameters and results.

    Args:
        experts: megatron-core's TEGroupedMLP, whose linear layers have a `weight0` and so on for each expert.
    """
    return type(experts.__name__, (_GroupedExperts, experts), {})


class _GroupedExperts:
    """Open: for SwiGLU without biases in 32 bits on a CPU or in bf16 on a GPU that has the products, on one rank of
    expert tensor parallelism, and while nobody watches the modules inside.

    Weights are used as one tensor [e, o, i]. Megatron's data parallelism lays parameters out last first, so that they
    are registered last first here; elsewhere they are copied together.
    """

    config: TransformerConfig
    num_local_experts: int
    linear_fc1: Any
    linear_fc2: Any

    def __init__(self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, config, *args, **kwargs)  # type: ignore[call-arg]
        own: Any = self
        self.are_gradients_awaited: Callable[[], bool] = lambda: True
        """Whether data parallelism waits for a gradient of every weight in this micro-batch, and not of one alone."""
        self._is_short = can_be_grouped(config) and own.tp_group.size() == 1
        if self._is_short:
            for linear in (self.linear_fc1, self.linear_fc2):
                _register_last_first(linear, num_local_experts)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        **buffers: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the experts of this rank; see TEGroupedMLP.

        Args:
            permuted_local_hidden_states: [t, h], the rows of each expert behind one another; there may be none.
            tokens_per_expert: [e] int64, where the dispatcher left it.
            permuted_probs: [t] float32.
            buffers: As TEGroupedMLP takes them.

        Returns: [t, h], and None for a bias.
        """
        rows, probs = permuted_local_hidden_states, permuted_probs
        if (
            not self._is_short
            or buffers
            or not _has_products(rows)
            or is_watched(self.linear_fc1, self.linear_fc2)
        ):
            base: Any = super()
            return base.forward(rows, tokens_per_expert, probs, **buffers)
        wait_for_weights(self.linear_fc1, self.linear_fc2)
        ends = to_device(tokens_per_expert.cumsum(0).to(torch.int32), rows.device)
        fc1, fc2 = (_weights(linear, self.num_local_experts) for linear in (self.linear_fc1, self.linear_fc2))
        weights = [weight for weight in (*fc1, *fc2) if weight.requires_grad]
        is_alone = bool(weights) and main_grad_of(weights[0]) is not None and not self.are_gradients_awaited()
        keeps = not cast(Any, self).activation_recompute
        # All main gradients come with the first one, and each that autograd delivers costs the CPU time of a hook.
        passed = weights[:1] if is_alone else weights
        out = _Experts.apply(rows, probs, ends, fc1, fc2, keeps, *passed)
        return cast(Tensor, out), None


def can_be_grouped(config: TransformerConfig) -> bool:
    """Whether the experts that a config describes are what :class:`_Experts` computes."""
    is_plain_swiglu = (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and not config.add_bias_linear
        and not config.use_te_activation_func
        and not config.activation_func_fp8_input_store
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
        and config.moe_mlp_glu_interleave_size is None
    )
    does_more = (
        config.use_transformer_engine_op_fuser
        or config.moe_single_grouped_weight
        or config.moe_apply_probs_on_input
        or config.moe_paged_stash
        or config.fine_grained_activation_offloading
        or config.delay_wgrad_compute
        or config.overlap_dispatch_backward_with_experts_wgrad
    )
    widths = (config.moe_latent_size or config.hidden_size, 2 * (config.moe_ffn_hidden_size or 0))
    is_aligned = not any(width % ALIGNMENT for width in widths)
    return is_plain_swiglu and not does_more and is_aligned and config.fp8 is None and config.fp4 is None


def _has_products(rows: Tensor) -> bool:
    if rows.is_cuda:
        return rows.dtype is torch.bfloat16 and _capability(rows.device)[0] in CAPABILITIES
    return rows.dtype in (torch.float32, torch.bfloat16)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _weights(linear: Any, count: int) -> tuple[Tensor, ...]:
    """Weights of the experts [o, i], past the module's attributes, which are slow to look up."""
    return tuple(linear._parameters[f"weight{index}"] for index in range(count))


def _register_last_first(linear: Any, count: int) -> None:
    parameters = linear._parameters
    for index in reversed(range(count)):
        name = f"weight{index}"
        parameters[name] = parameters.pop(name)  # to the end


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """[e, o, i], a view where the weights lie behind one another."""
    view = as_one(weights)
    return torch.stack(list(weights)) if view is None else view


class _Experts(torch.autograd.Function):
    """Rows [t, h], their weights [t] and the ends of groups [e] -> [t, h]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probs: Tensor,
        ends: Tensor,
        fc1: tuple[Tensor, ...],
        fc2: tuple[Tensor, ...],
        keeps: bool,
        *passed: Tensor,
    ) -> Tensor:
        rows, probs = rows.contiguous(), probs.contiguous()
        inner = grouped_linear(rows, _joined(fc1), ends)
        activated = weighted_swiglu_forward(inner, probs, _activated_width(inner))
        ctx.save_for_backward(rows, probs, ends, inner, activated if keeps else None)
        ctx.weights, ctx.num_passed = (fc1, fc2), len(passed)
        return grouped_linear(activated, padded(_joined(fc2), activated.shape[1]), ends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, ends, inner, activated = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        d_out = grad_outputs[0].contiguous()
        if activated is None:
            activated = weighted_swiglu_forward(inner, probs, _activated_width(inner))
        d_fc2 = _gradients(fc2, d_out, activated, ends)
        d_activated = grouped_linear_backward(d_out, padded(_joined(fc2), activated.shape[1]), ends)
        del activated
        d_inner, d_probs = weighted_swiglu_backward(d_activated, inner, probs)
        d_fc1 = _gradients(fc1, d_inner, rows, ends)
        d_rows = grouped_linear_backward(d_inner, _joined(fc1), ends) if ctx.needs_input_grad[0] else None
        return d_rows, d_probs, None, None, None, None, *[*d_fc1, *d_fc2][: ctx.num_passed]


def _activated_width(inner: Tensor) -> int:
    width = inner.shape[1] // 2
    return width + -width % ALIGNMENT


def _gradients(weights: tuple[Tensor, ...], d_out: Tensor, rows: Tensor, ends: Tensor) -> list[Tensor]:
    """As :func:`grouped_weight_gradients`; none of frozen weights, which nobody passed: they are frozen together."""
    return grouped_weight_gradients(weights, d_out, rows, ends) if weights[0].requires_grad else []
