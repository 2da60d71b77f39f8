# SPDX-License-Identifier: Apache-2.0
"""RMS norm and layer norm that also hand on their input as the residual, so that both gradients are summed on the way.

TransformerEngine has tuned kernels for some widths only; for the others its two backward kernels take three times as
long as the memory needs, and autograd adds the residual's gradient in one more pass.
"""

from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Rows of one program of the backward pass, which sums their part of the weight's gradient in registers."""


class NormStatistics(NamedTuple):
    """What the backward pass needs of the forward one."""

    means: Tensor | None
    """[t] float32; None for the RMS norm."""
    scales: Tensor
    """One over the root of the mean square, or over the standard deviation, [t] float32."""


def residual_norm(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension: layer norm where there is a bias, else RMS norm.

    Args:
        hidden_states: [..., h].
        weight: [h].
        bias: [h] or None.
        eps: Added to the variance or the mean square.

    Returns: The normalised states [..., h], and `hidden_states` to be used as the residual. Arithmetic is fp32.
    """
    return cast(tuple[Tensor, Tensor], _ResidualNorm.apply(hidden_states, weight, bias, eps))


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows = hidden_states.contiguous().flatten(0, -2)
        out, statistics = norm_forward(rows, weight, bias, eps)
        ctx.save_for_backward(rows, weight, *statistics)
        return out.view(hidden_states.shape), hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, means, scales = ctx.saved_tensors
        gradient, passed = (part.contiguous().view(rows.shape) for part in grad_outputs)
        d_rows, d_weight, d_bias = norm_backward(
            rows, weight, NormStatistics(means, scales), gradient, passed
        )
        d_bias = None if d_bias is None else d_bias.to(weight.dtype)
        return d_rows.view(grad_outputs[0].shape), d_weight.to(weight.dtype), d_bias, None


def norm_forward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, NormStatistics]:
    """[t, h] -> normalised [t, h] and what :func:`norm_backward` needs; see :func:`residual_norm`."""
    out = torch.empty_like(rows)
    num_rows, width = rows.shape
    scales = rows.new_empty(num_rows, dtype=torch.float32)
    means = None if bias is None else torch.empty_like(scales)
    if num_rows:
        _norm_forward[(num_rows,)](
            rows, weight, bias, out, means, scales, eps, **_constants(width, bias is not None, 1024)
        )
    return out, NormStatistics(means, scales)


def norm_backward(
    rows: Tensor, weight: Tensor, statistics: NormStatistics, gradient: Tensor, passed: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`norm_forward`.

    Args:
        rows: Its input, [t, h].
        weight: [h].
        statistics: What it put out.
        gradient: Of the normalised states, [t, h].
        passed: Gradient of the residual, [t, h].

    Returns: Gradients of `rows` [t, h] with `passed` added, of the weight [h] float32 and the bias [h] float32 or None.
    """
    d_rows = torch.empty_like(rows)
    means, scales = statistics
    num_rows, width = rows.shape
    programs = -(-num_rows // ROWS)
    sums = rows.new_empty(programs, 1 if means is None else 2, width, dtype=torch.float32)
    if num_rows:
        _norm_backward[(programs,)](
            rows, weight, means, scales, gradient, passed, d_rows, sums, num_rows,
            ROWS=cast(Any, ROWS), **_constants(width, means is not None, 2048),
        )  # fmt: skip
    total = sums.sum(dim=0)
    return d_rows, total[0], None if means is None else total[1]


@cache
def _constants(width: int, is_centred: bool, per_warp: int) -> dict[str, Any]:
    """Sizes, and warps for so many elements each: what was fastest on an H100 for widths from 1,280 to 3,584."""
    block: Any = triton.next_power_of_2(width)
    warps = min(max(block // per_warp, 2), 16)
    return {"IS_CENTRED": is_centred, "WIDTH": width, "BLOCK": block, "num_warps": warps}


@triton.jit
def _norm_forward(
    rows, weight, bias, out, means, scales, eps,
    IS_CENTRED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < WIDTH
    x = tl.load(rows + row * WIDTH + lanes, inside, 0.0).to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(x) / WIDTH
        x = tl.where(inside, x - mean, 0.0)
        tl.store(means + row, mean)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + eps)
    y = x * scale * tl.load(weight + lanes, inside, 0.0).to(tl.float32)
    if IS_CENTRED:
        y += tl.load(bias + lanes, inside, 0.0).to(tl.float32)
    tl.store(out + row * WIDTH + lanes, y, inside)
    tl.store(scales + row, scale)


@triton.jit
def _norm_backward(
    rows, weight, means, scales, gradient, passed, d_rows, sums, num_rows,
    ROWS: tl.constexpr, IS_CENTRED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < WIDTH
    w = tl.load(weight + lanes, inside, 0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], dtype=tl.float32)
    bias_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(ROWS):
        row = program.to(tl.int64) * ROWS + index
        is_row = inside & (row < num_rows)
        start = row * WIDTH
        scale = tl.load(scales + row, row < num_rows, 0.0)
        x = tl.load(rows + start + lanes, is_row, 0.0).to(tl.float32)
        if IS_CENTRED:
            x = tl.where(is_row, x - tl.load(means + row, row < num_rows, 0.0), 0.0)
        x = x * scale
        g = tl.load(gradient + start + lanes, is_row, 0.0).to(tl.float32)
        residual = tl.load(passed + start + lanes, is_row, 0.0).to(tl.float32)
        weight_sum += g * x
        if IS_CENTRED:
            bias_sum += g
        g = g * w
        along = tl.sum(g * x) / WIDTH
        d = g - x * along
        if IS_CENTRED:
            d = d - tl.sum(g) / WIDTH
        tl.store(d_rows + start + lanes, scale * d + residual, is_row)
    if IS_CENTRED:
        tl.store(sums + program * 2 * WIDTH + lanes, weight_sum, inside)
        tl.store(sums + (program * 2 + 1) * WIDTH + lanes, bias_sum, inside)
    else:
        tl.store(sums + program * WIDTH + lanes, weight_sum, inside)
