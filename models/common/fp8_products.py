# SPDX-License-Identifier: Apache-2.0
"""A layer's matrix products in fp8, with scales that are taken from what is rounded.

TransformerEngine rounds and multiplies; what its modules do around that takes the CPU longer than a GPU needs for rows
of a few thousand tokens, and reads what SwiGLU puts out once more for its largest value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from models.common.kernels.products import bias_gradient, main_grad_of, mark_delivered
from models.common.layer_products import Products, activate, activation_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How a recipe rounds, and multiplies what it rounded.

    Each kind of matrix has a format of its own, and may be rounded twice, for products along its rows and its columns.
    """

    rows: Callable[[Tensor], Any]
    weights: Callable[[Tensor], Any]
    gradients: Callable[[Tensor], Any]
    multiply: Callable[..., Any]
    """TransformerEngine's `general_gemm`; puts out a sequence with the product first."""
    is_exact: tuple[bool, bool]
    """Whether sums of products are kept in fp32 all along: in the forward pass, and in the backward pass."""
    swiglu: Callable[[Tensor, Any], Any] | None = None
    """SwiGLU that notes the largest value on the way, rounded as `rows` rounds."""
    swiglu_backward: Callable[[Tensor, Tensor, Any], Any] | None = None
    """Its gradient, rounded as `gradients` rounds."""


def te_rounding(config: TransformerConfig) -> Rounding:
    """TransformerEngine's rounding for a config's `fp8_recipe`, which needs no history of scales."""
    from megatron.core.fp8_utils import get_fp8_recipe

    quantization: Any = import_module("transformer_engine.pytorch.quantization")
    general_gemm: Any = import_module("transformer_engine.pytorch.cpp_extensions").general_gemm
    tex: Any = import_module("transformer_engine_torch")
    recipe: Any = get_fp8_recipe(config)
    make = quantization.RecipeState.create
    rows, weights, _ = make(recipe, mode="forward", num_quantizers=3).make_quantizers()
    gradients, _ = make(recipe, mode="backward", num_quantizers=2).make_quantizers()
    for quantizer in (rows, weights, gradients):
        quantizer.internal = True  # bare data: nothing but the products sees it
    fused: dict[str, Any] = (
        {"swiglu": tex.swiglu, "swiglu_backward": tex.dswiglu} if recipe.float8_current_scaling() else {}
    )
    return Rounding(
        rows=rows,
        weights=weights,
        gradients=gradients,
        multiply=general_gemm,
        is_exact=(
            recipe.fp8_gemm_fprop.use_split_accumulator,
            recipe.fp8_gemm_dgrad.use_split_accumulator,
        ),
        **fused,
    )


class Fp8Products(Products):
    """Products of what is rounded to fp8: inputs and output gradients where they occur, weights once a step."""

    row_multiple = 16

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._weights: dict[int, Any] = {}

    def begin(self, linears: Sequence[Any]) -> None:
        """Round the weights when megatron-core says that a step begins, as TransformerEngine's layers do."""
        for linear in linears:
            weight = linear._parameters["weight"]
            if linear.is_first_microbatch or id(weight) not in self._weights:
                self._weights.pop(id(weight), None)  # its memory is what the new one gets
                self._weights[id(weight)] = self._rounding.weights(weight.detach())
                linear.is_first_microbatch = False

    def operand(self, rows: Tensor) -> Any:
        """See :class:`Products`."""
        return self._rounding.rows(rows)

    def gradient(self, d_out: Tensor) -> Any:
        """See :class:`Products`."""
        return self._rounding.gradients(d_out)

    def linear(self, operand: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Put out [t, o]; of the operand only what the gradient of the weight takes is left."""
        out = self._rounding.multiply(
            self._weights[id(weight)], operand, out_dtype=weight.dtype, bias=bias,
            use_split_accumulator=self._rounding.is_exact[0],
        )[0]  # fmt: skip
        operand.update_usage(rowwise_usage=False, columnwise_usage=True)
        return out

    def linear_onto(self, residual: Tensor, operand: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Products`, and :meth:`linear`."""
        return residual + self.linear(operand, weight, bias).view(residual.shape)

    def input_gradient(self, d_operand: Any, weight: Tensor, operand: Any = None) -> Tensor:
        """See :class:`Products`; what is rounded is never padded."""
        return self._rounding.multiply(
            self._weights[id(weight)], d_operand, layout="NN", grad=True, out_dtype=weight.dtype,
            use_split_accumulator=self._rounding.is_exact[1],
        )[0]  # fmt: skip

    def weight_gradient(self, weight: Tensor, d_operand: Any, operand: Any) -> Tensor | None:
        """See :class:`Products`."""
        if not weight.requires_grad:
            return None
        main_grad = main_grad_of(weight)
        out = self._rounding.multiply(
            operand, d_operand, layout="NT", grad=True, out=main_grad, accumulate=main_grad is not None,
            out_dtype=weight.dtype if main_grad is None else main_grad.dtype,
            use_split_accumulator=self._rounding.is_exact[1],
        )[0]  # fmt: skip
        return out if main_grad is None else mark_delivered(weight)

    def activate(self, inner: Tensor, activation: str) -> Any:
        """See :class:`Products`."""
        if activation == "swiglu" and self._rounding.swiglu is not None:
            return self._rounding.swiglu(inner, self._rounding.rows)
        return self.operand(activate(inner, activation))

    def activation_gradient(
        self, d_activated: Tensor, inner: Tensor, activation: str, bias: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """See :class:`Products`."""
        if activation == "swiglu" and self._rounding.swiglu_backward is not None and bias is None:
            return self._rounding.swiglu_backward(d_activated, inner, self._rounding.gradients), None
        d_inner = activation_backward(d_activated, inner, activation)
        return self.gradient(d_inner), bias_gradient(bias, d_inner)

    def save(self, ctx: Any, *parts: Any) -> None:
        """Keep the tensors that operands consist of where autograd lets go of them."""
        tensors: list[Tensor | None] = []
        operands: list[Any] = []
        for part in parts:
            if part is None or isinstance(part, Tensor):
                tensors.append(part)
                operands.append(None)
            else:
                inside, operand = part.prepare_for_saving()
                tensors += inside
                operands.append(operand)
        ctx.save_for_backward(*tensors)
        ctx.operands = operands

    def saved(self, ctx: Any) -> Sequence[Any]:
        """See :class:`Products`; to be asked for once."""
        tensors: Any = list(ctx.saved_tensors)
        parts: list[Any] = []
        for operand in ctx.operands:
            if operand is None:
                parts.append(tensors.pop(0))
            else:
                tensors = list(operand.restore_from_saved(tensors))
                parts.append(operand)
        ctx.operands = None  # or they would outlive the backward pass
        return parts


def products_of(config: TransformerConfig) -> Products:
    """Products in a config's format."""
    return Products() if config.fp8 is None else Fp8Products(te_rounding(config))
