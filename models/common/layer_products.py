# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a layer, and what lies between those of its MLP, in the format of its weights.

A layer's autograd functions are written once for all formats: what they multiply and keep for the backward pass they
get from :class:`Products`, and take it to be nothing but that. :mod:`models.common.fp8_products` rounds it to fp8.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common.kernels.products import bias_gradient, linear, linear_onto, padded, weight_gradient
from models.common.kernels.swiglu import swiglu_backward, swiglu_forward
from models.common.specs import ALIGNMENT


class Products:
    """Products of what is given, as it is.

    An operand is a matrix as it is multiplied: here the matrix itself. One that was padded for alignment is multiplied
    with a weight that is.
    """

    row_multiple = 1
    """Of how many rows there must be a multiple."""

    def begin(self, linears: Sequence[Any]) -> None:
        """Make ready for a forward pass through these linear layers."""

    def operand(self, rows: Tensor) -> Any:
        """What a linear layer with the input [t, i] multiplies with its weight."""
        return rows

    def gradient(self, d_out: Tensor) -> Any:
        """What the gradients of a linear layer with the output's gradient [t, o] are products of."""
        return d_out

    def linear(self, operand: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Put out [t, o]."""
        return linear(operand, weight, bias)

    def linear_onto(self, residual: Tensor, operand: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Put out [..., o] added to the residual [..., o], which is no view."""
        return linear_onto(residual, operand, padded(weight, operand.shape[1]), bias)

    def input_gradient(self, d_operand: Any, weight: Tensor, operand: Any = None) -> Tensor:
        """Gradient of the input [t, i], as wide as the operand where that is given."""
        return d_operand @ (weight if operand is None else padded(weight, operand.shape[1]))

    def weight_gradient(self, weight: Tensor, d_operand: Any, operand: Any) -> Tensor | None:
        """Gradient of the weight; see :func:`models.common.kernels.products.weight_gradient`."""
        return weight_gradient(weight, d_operand, operand)

    def activate(self, inner: Tensor, activation: str) -> Any:
        """Operand of the MLP's second product from what the first put out."""
        return activate(inner, activation)

    def activation_gradient(
        self, d_activated: Tensor, inner: Tensor, activation: str, bias: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """Gradients of the MLP's first product and of its bias, [f] float32, if it has one that is trained."""
        d_inner = activation_backward(d_activated, inner, activation)
        return d_inner, bias_gradient(bias, d_inner)

    def save(self, ctx: Any, *parts: Any) -> None:
        """Keep tensors and operands for the backward pass."""
        ctx.save_for_backward(*parts)

    def saved(self, ctx: Any) -> Sequence[Any]:
        """What was kept, in its order."""
        return ctx.saved_tensors


def activate(inner: Tensor, activation: str) -> Tensor:
    """[t, f] of the MLP's first product, or [t, 2f] where the activation is gated -> [t, f], padded where gated."""
    if activation == "swiglu":
        width = inner.shape[1] // 2
        return swiglu_forward(inner, width + -width % ALIGNMENT)
    return F.gelu(inner, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_backward(gradient: Tensor, inner: Tensor, activation: str) -> Tensor:
    """Gradient of :func:`activate`'s input from that of its output."""
    if activation == "swiglu":
        return swiglu_backward(gradient, inner)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(gradient, inner, approximate=approximate)
