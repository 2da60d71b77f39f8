# SPDX-License-Identifier: Apache-2.0
"""Products of a linear layer, and gradients that go straight to where Megatron sums them over micro-batches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[t, i] with a weight [o, i] -> [t, o]."""
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def linear_onto(residual: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer's output [t, o] added to the residual [..., o]; a new tensor of the residual's shape."""
    out = residual.new_empty(residual.shape)  # no view: pipeline stages let go of its values
    flat = out.view(-1, out.shape[-1])
    if bias is None:  # cuBLAS adds to a copy: one pass less, and one rounding
        torch.addmm(residual.reshape(flat.shape), rows, weight.t(), out=flat)
        return out
    torch.addmm(bias, rows, weight.t(), out=flat)
    return out.add_(residual)


def padded(weight: Tensor, width: int) -> Tensor:
    """[..., i] -> [..., width] with zeros behind: Qwen2.5-VL's vision MLP is 3,420 wide, which is not aligned."""
    return weight if weight.shape[-1] == width else F.pad(weight, (0, width - weight.shape[-1]))


def weight_gradient(weight: Tensor, d_out: Tensor, rows: Tensor) -> Tensor | None:
    """Gradient of a linear layer's weight [o, i] from that of its output [t, o] and its input [t, i].

    An input that was padded for alignment, [t, > i], is multiplied as it is: cuBLAS has a kernel of the GPU's own
    generation only for aligned rows, and takes three times as long for the product of what is inside.

    Where data parallelism keeps a main gradient it is added there in the product itself, and what is returned only
    tells autograd that it came; its values mean nothing. None for a frozen weight.
    """
    if not weight.requires_grad:
        return None
    main_grad, width = main_grad_of(weight), weight.shape[1]
    if main_grad is None:
        return (d_out.t() @ rows)[:, :width]
    is_whole = rows.shape[1] == width
    if is_whole and main_grad.dtype == rows.dtype:
        main_grad.addmm_(d_out.t(), rows)
    elif is_whole and rows.is_cuda:
        torch.addmm(main_grad, d_out.t(), rows, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(_product(d_out.t(), rows, main_grad.dtype)[:, :width])
    return mark_delivered(weight)


def table_gradient(weight: Tensor, ids: Tensor, d_rows: Tensor) -> Tensor | None:
    """Gradient of a table [v, h] from those of the rows [t, h] that were taken from it, as :func:`weight_gradient`.

    Only rows that were taken are written: those of one id are summed first, so that it is the same sum each time.

    Args:
        weight: The table, [v, h].
        ids: Which row was taken, [t] int64.
        d_rows: Gradient of each row taken, [t, h].
    """
    if not weight.requires_grad:
        return None
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return torch.ops.aten.embedding_dense_backward(d_rows, ids, len(weight), -1, False)
    ranks, rows = _distinct(ids, len(weight))
    sums = torch.ops.aten.embedding_dense_backward(d_rows.to(main_grad.dtype), ranks, len(rows), -1, False)
    main_grad.index_add_(0, rows, sums)
    return mark_delivered(weight)


def _distinct(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Number the distinct ids in their order, without telling the CPU how many there are.

    Args:
        ids: [t] int64.
        num_rows: All ids are below.

    Returns: The number of each id's kind [t], and the id of each kind, [min(t, num_rows)]: behind the last one
    come rows that get zeros added, each another one.
    """
    in_order, order = ids.sort()
    numbers = F.pad((in_order[1:] != in_order[:-1]).cumsum(0), (1, 0)) if len(ids) else ids
    kinds = torch.arange(min(len(ids), num_rows), device=ids.device).scatter_(0, numbers, in_order)
    return torch.empty_like(ids).scatter_(0, order, numbers), kinds


def vector_gradients(
    vectors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of biases and norms, given in fp32, as :func:`weight_gradient` returns them; all in one kernel."""
    main_grads: list[Tensor] = []
    added: list[Tensor] = []
    returned: list[Tensor | None] = []
    for vector, gradient in zip(vectors, gradients, strict=True):
        if vector is None or gradient is None or not vector.requires_grad:
            returned.append(None)
            continue
        main_grad = main_grad_of(vector)
        if main_grad is None:
            returned.append(gradient.to(vector.dtype))
            continue
        main_grads.append(main_grad)
        added.append(gradient)
        returned.append(mark_delivered(vector))
    if added:
        torch._foreach_add_(main_grads, added)
    return returned


def bias_gradient(bias: Tensor | None, d_out: Tensor) -> Tensor | None:
    """Sum over rows, [t, o] -> [o] float32; None without a bias to be trained."""
    return None if bias is None or not bias.requires_grad else d_out.sum(dim=0, dtype=torch.float32)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Left @ right in a longer format, which only CUDA has."""
    is_plain = left.dtype == dtype or not left.is_cuda
    return left @ right if is_plain else torch.mm(left, right, out_dtype=dtype)


def main_grad_of(parameter: Any) -> Tensor | None:
    """Where data parallelism sums a parameter's gradients, or None; Megatron's gives a parameter both, or neither."""
    return parameter.main_grad if hasattr(parameter, "grad_added_to_main_grad") else None


def mark_delivered(parameter: Any) -> Tensor:
    """Tell data parallelism that the main gradient has it; what is returned tells autograd, its values mean nothing."""
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)
