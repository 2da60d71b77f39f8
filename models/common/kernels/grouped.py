# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows with a weight for each group: experts, whose rows lie behind one another.

    rows [t, i], weights [e, o, i], ends [e] int32: group g is rows[ends[g - 1] : ends[g]] -> [t, o]

One launch for all groups; nobody needs to know on the CPU how long they are. Products of rows are torch's
`_grouped_mm`, whose kernel for bf16 on a GPU of compute capability 9 or 10 wants (torch 2.11, `GroupMM.cu`):

- `ends` int32, rising, on the rows' device; groups may be empty and of any length where rows are grouped;
- one of a matrix's two strides 1, the other a multiple of 16 bytes, and weights that begin at multiples of 16 bytes:
  widths are padded to :data:`models.common.specs.ALIGNMENT`;
- fewer than 1,024 groups.

Elsewhere it goes through a loop. It puts out bf16 only, so that a gradient of weights would be rounded before it is
added to one in fp32: those are a kernel of our own, which adds in place.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.common.kernels.products import main_grad_of

BLOCK_OUT, BLOCK_IN, BLOCK_ROWS = 128, 128, 64
WARPS, STAGES = 4, 3
"""Of the weights' gradient, not yet measured: two programs fit on a multiprocessor of an H100, one multiplies while the
other adds to memory. With 8 warps ptxas says that it lets products wait for one another."""


def grouped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """[t, i] with weights [e, o, i] -> [t, o]; all widths aligned, see above."""
    return _grouped_product(rows, weights.transpose(1, 2), ends)


def grouped_linear_backward(d_out: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the rows [t, i] from that of the output [t, o]."""
    return _grouped_product(d_out, weights, ends)


def _grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if not len(rows):  # no expert of this rank was chosen, and a kernel would be given no address
        return rows.new_empty(0, matrices.shape[-1])
    return torch._grouped_mm(rows, matrices, offs=ends)


def grouped_weight_gradients(
    weights: Sequence[Tensor], d_out: Tensor, rows: Tensor, ends: Tensor
) -> list[Tensor]:
    """Gradients of weights, e times [o, i], from that of the output [t, o] and the rows [t, i].

    Rows may be padded, [t, > i]. Where data parallelism keeps main gradients they are added there, and what is
    returned only tells autograd that they came: its values mean nothing, and all of it lies in one place.
    """
    main_grads = [main_grad for weight in weights if (main_grad := main_grad_of(weight)) is not None]
    first = weights[0]
    if not main_grads:
        return list(_weight_gradients(d_out, rows, ends, first).unbind())
    assert len(main_grads) == len(weights)
    joined = as_one(main_grads)
    if joined is None:
        added = _weight_gradients(d_out, rows, ends, first, dtype=main_grads[0].dtype)
        torch._foreach_add_(main_grads, list(added.unbind()))
    else:
        _launch(d_out, rows, ends, joined, accumulates=True)
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return list(torch.empty_like(first).expand(len(weights), *first.shape).unbind())


def _weight_gradients(
    d_out: Tensor, rows: Tensor, ends: Tensor, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    gradients = like.new_empty(len(ends), *like.shape, dtype=dtype or like.dtype)
    _launch(d_out, rows, ends, gradients, accumulates=False)
    return gradients


def as_one(tensors: Sequence[Any]) -> Tensor | None:
    """Equally large, contiguous tensors as one view [e, ...], where they lie behind one another at equal distances.

    Megatron's data parallelism lays weights and their gradients out like that, last first, in one buffer for all.
    None where they do not.
    """
    first, size = tensors[0], tensors[0].element_size()
    places = [tensor.data_ptr() for tensor in tensors]
    distances = {after - before for before, after in pairwise(places)} or {first.numel() * size}
    distance = distances.pop()
    is_even = not distances and distance >= first.numel() * size and distance % size == 0
    is_shared = first.untyped_storage().data_ptr() == tensors[-1].untyped_storage().data_ptr()
    if not (is_even and is_shared and all(tensor.is_contiguous() for tensor in tensors)):
        return None
    return first.as_strided((len(tensors), *first.shape), (distance // size, *first.stride()))


def _launch(d_out: Tensor, rows: Tensor, ends: Tensor, out: Tensor, *, accumulates: bool) -> None:
    """Add to `out` [e, o, i], or fill it."""
    num_groups, num_out, num_in = out.shape
    grid = (-(-num_out // BLOCK_OUT) * -(-num_in // BLOCK_IN), num_groups)
    _add_weight_gradients[grid](
        d_out, rows, ends, out, out.stride(0),
        **_constants(num_out, num_in, rows.shape[1], accumulates, rows.is_cuda),
    )  # fmt: skip


@cache
def _constants(
    num_out: int, num_in: int, row_width: int, accumulates: bool, is_compiled: bool
) -> dict[str, Any]:
    return {
        "OUT": num_out, "IN": num_in, "ROW_WIDTH": row_width, "ACCUMULATES": accumulates, "IS_COMPILED": is_compiled,
        "BLOCK_OUT": BLOCK_OUT, "BLOCK_IN": BLOCK_IN, "BLOCK_ROWS": BLOCK_ROWS,
        "num_warps": WARPS, "num_stages": STAGES,
    }  # fmt: skip


@triton.jit
def _add_weight_gradients(
    d_out, rows, ends, out, distance,
    OUT: tl.constexpr, IN: tl.constexpr, ROW_WIDTH: tl.constexpr, ACCUMULATES: tl.constexpr,
    IS_COMPILED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # A program makes one block of one group's gradient from all rows of the group; blocks of a group run together.
    group = tl.program_id(1)
    start = tl.load(ends + group - 1, group > 0, 0)
    end = tl.load(ends + group)
    blocks_in: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    o = (tl.program_id(0) // blocks_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = (tl.program_id(0) % blocks_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        t = first + tl.arange(0, BLOCK_ROWS)
        inside = (t < end)[:, None]
        t = t.to(tl.int64)[:, None]
        left = tl.load(d_out + t * OUT + o[None, :], inside & (o < OUT)[None, :], 0.0)
        right = tl.load(rows + t * ROW_WIDTH + i[None, :], inside & (i < IN)[None, :], 0.0)
        if not IS_COMPILED:  # Triton's interpreter multiplies the bits of bf16
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    places = out + group.to(tl.int64) * distance + o[:, None] * IN + i[None, :]
    is_written = (o < OUT)[:, None] & (i < IN)[None, :]
    if ACCUMULATES:
        is_written = is_written & (end > start)  # nothing to add to most experts of a short row
        total += tl.load(places, is_written, 0.0).to(tl.float32)
    tl.store(places, total, is_written)
