# SPDX-License-Identifier: Apache-2.0
"""RMS norm that also hands on its input as the residual, so that both gradients are summed on the way through.

TransformerEngine has tuned kernels for some widths only; for the others its two backward kernels take three times as
long as the memory needs, and autograd adds the residual's gradient in one more pass.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Rows of one program of the backward pass, which sums their part of the weight's gradient in registers."""


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension.

    Args:
        hidden_states: [..., h].
        weight: [h].
        eps: Added to the mean square.

    Returns: The normalised states [..., h], and `hidden_states` to be used as the residual. Arithmetic is fp32.
    """
    return cast(tuple[Tensor, Tensor], _RMSNorm.apply(hidden_states, weight, eps))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows = hidden_states.contiguous().flatten(0, -2)
        out = torch.empty_like(rows)
        scales = rows.new_empty(len(rows), dtype=torch.float32)
        if len(rows):
            _rms_norm_forward[(len(rows),)](rows, weight, out, scales, eps, **_constants(rows, 1024))
        ctx.save_for_backward(rows, weight, scales)
        return out.view(hidden_states.shape), hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scales = ctx.saved_tensors
        gradient, residual = (part.contiguous() for part in grad_outputs)
        d_rows = torch.empty_like(rows)
        programs = -(-len(rows) // ROWS)
        d_weight = rows.new_empty(programs, rows.shape[1], dtype=torch.float32)
        if len(rows):
            _rms_norm_backward[(programs,)](
                rows, weight, scales, gradient, residual, d_rows, d_weight, len(rows),
                ROWS=cast(Any, ROWS), **_constants(rows, 2048),
            )  # fmt: skip
        return d_rows.view(gradient.shape), d_weight.sum(dim=0).to(weight.dtype), None


def _constants(rows: Tensor, per_warp: int) -> dict[str, Any]:
    """Sizes, and warps for so many elements each: what was fastest on an H100 for widths from 1,280 to 3,584."""
    block: Any = triton.next_power_of_2(rows.shape[1])
    return {"WIDTH": rows.shape[1], "BLOCK": block, "num_warps": min(max(block // per_warp, 2), 16)}


@triton.jit
def _rms_norm_forward(rows, weight, out, scales, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < WIDTH
    x = tl.load(rows + row * WIDTH + lanes, inside, 0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + eps)
    w = tl.load(weight + lanes, inside, 0.0).to(tl.float32)
    tl.store(out + row * WIDTH + lanes, x * scale * w, inside)
    tl.store(scales + row, scale)


@triton.jit
def _rms_norm_backward(
    rows, weight, scales, gradient, residual, d_rows, d_weight, num_rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < WIDTH
    w = tl.load(weight + lanes, inside, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(ROWS):
        row = program.to(tl.int64) * ROWS + index
        is_row = inside & (row < num_rows)
        start = row * WIDTH
        scale = tl.load(scales + row, row < num_rows, 0.0)
        x = tl.load(rows + start + lanes, is_row, 0.0).to(tl.float32) * scale
        g = tl.load(gradient + start + lanes, is_row, 0.0).to(tl.float32)
        passed = tl.load(residual + start + lanes, is_row, 0.0).to(tl.float32)
        total += g * x
        g = g * w
        along = tl.sum(g * x) / WIDTH
        tl.store(d_rows + start + lanes, scale * (g - x * along) + passed, is_row)
    tl.store(d_weight + program * WIDTH + lanes, total, inside)
