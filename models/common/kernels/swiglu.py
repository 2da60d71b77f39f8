# SPDX-License-Identifier: Apache-2.0
"""SwiGLU, `silu(gate) * up`, of a joined projection, and its gradient. What is put out may be padded with zeros."""

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def swiglu_forward(joined: Tensor, width: int) -> Tensor:
    """[t, 2f], gates first -> [t, width] with zeros from f on; arithmetic is fp32."""
    num_rows, joined_width = joined.shape
    out = joined.new_empty(num_rows, width)
    if num_rows:
        grid = (num_rows, -(-width // BLOCK))
        _swiglu_forward[grid](joined, out, **_constants(joined_width, width))
    return out


def swiglu_backward(gradient: Tensor, joined: Tensor) -> Tensor:
    """Gradient of `joined` [t, 2f] from that of the output [t, width]."""
    num_rows, joined_width = joined.shape
    d_joined = joined.new_empty(num_rows, joined_width)
    if num_rows:
        grid = (num_rows, -(-joined_width // (2 * BLOCK)))
        _swiglu_backward[grid](gradient, joined, d_joined, **_constants(joined_width, gradient.shape[1]))
    return d_joined


@cache
def _constants(joined_width: int, width: int) -> dict[str, Any]:
    return {"HALF": joined_width // 2, "WIDTH": width, "BLOCK": BLOCK, "num_warps": 4}


@triton.jit
def _swiglu_forward(joined, out, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = joined + row * 2 * HALF + lanes
    gate = tl.load(places, lanes < HALF, 0.0).to(tl.float32)
    up = tl.load(places + HALF, lanes < HALF, 0.0).to(tl.float32)
    tl.store(out + row * WIDTH + lanes, gate * tl.sigmoid(gate) * up, lanes < WIDTH)


@triton.jit
def _swiglu_backward(
    gradient, joined, d_joined, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < HALF
    places = row * 2 * HALF + lanes
    gate = tl.load(joined + places, inside, 0.0).to(tl.float32)
    up = tl.load(joined + places + HALF, inside, 0.0).to(tl.float32)
    g = tl.load(gradient + row * WIDTH + lanes, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(d_joined + places, g * up * (sigmoid + silu * (1.0 - sigmoid)), inside)
    tl.store(d_joined + places + HALF, g * silu, inside)


def weighted_swiglu_forward(joined: Tensor, row_weights: Tensor, width: int) -> Tensor:
    """[t, 2f], gates first, and weights [t] -> [t, width], each row times its weight, with zeros from f on.

    Arithmetic is fp32 up to one rounding, as in megatron-core's compiled `weighted_bias_swiglu_impl`.
    """
    num_rows, joined_width = joined.shape
    out = joined.new_empty(num_rows, width)
    if num_rows:
        grid = (num_rows, -(-width // BLOCK))
        _weighted_swiglu_forward[grid](joined, row_weights, out, **_constants(joined_width, width))
    return out


def weighted_swiglu_backward(gradient: Tensor, joined: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `joined` [t, 2f] and of the rows' weights [t] from that of the output [t, width]."""
    num_rows, joined_width = joined.shape
    d_joined, d_row_weights = joined.new_empty(num_rows, joined_width), row_weights.new_empty(num_rows)
    if num_rows:
        _weighted_swiglu_backward[num_rows,](
            gradient, joined, row_weights, d_joined, d_row_weights,
            **_constants(joined_width, gradient.shape[1]),
        )  # fmt: skip
    return d_joined, d_row_weights


@triton.jit
def _weighted_swiglu_forward(
    joined, row_weights, out, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = joined + row * 2 * HALF + lanes
    gate = tl.load(places, lanes < HALF, 0.0).to(tl.float32)
    up = tl.load(places + HALF, lanes < HALF, 0.0).to(tl.float32)
    row_weight = tl.load(row_weights + row).to(tl.float32)
    tl.store(out + row * WIDTH + lanes, gate * tl.sigmoid(gate) * up * row_weight, lanes < WIDTH)


@triton.jit
def _weighted_swiglu_backward(
    gradient, joined, row_weights, d_joined, d_row_weights,
    HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program for a whole row, whose weight has a share in all of it.
    row = tl.program_id(0).to(tl.int64)
    row_weight = tl.load(row_weights + row).to(tl.float32)
    shares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, HALF, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        inside = lanes < HALF
        places = row * 2 * HALF + lanes
        gate = tl.load(joined + places, inside, 0.0).to(tl.float32)
        up = tl.load(joined + places + HALF, inside, 0.0).to(tl.float32)
        g = tl.load(gradient + row * WIDTH + lanes, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        shares += g * silu * up
        g *= row_weight
        tl.store(d_joined + places, g * up * (sigmoid + silu * (1.0 - sigmoid)), inside)
        tl.store(d_joined + places + HALF, g * silu, inside)
    tl.store(d_row_weights + row, tl.sum(shares))
