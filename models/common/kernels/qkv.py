# SPDX-License-Identifier: Apache-2.0
"""From the joined projection to queries, keys and values: split, normalise each head, turn, in one pass each way.

Done one by one this is a copy, a norm and a rotation of the queries, the same of the keys, a copy of the values, and
backward all of it again: 5% of a step of Qwen3-VL-4B on an H100.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 8, 2
"""Positions and warps of one program: forward and backward together the fastest of sixteen choices on an H100."""


def split_and_turn(
    mixed: Tensor,
    angles: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    *,
    num_groups: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised and turned, and values.

    Args:
        mixed: [s, b, g * (n/g + 2) * d]: for each of g groups its queries, its key, its value.
        angles: [s, b, 1, d] float32, both halves alike; element i turns with element i + d/2.
        query_weight: [d], of the norm over each query head; None normalises neither queries nor keys.
        key_weight: [d], likewise for keys.
        num_groups: g.
        head_dim: d.
        eps: Of the norms.

    Returns: [s, b, n, d], [s, b, g, d], [s, b, g, d]; arithmetic is fp32 up to the last rounding.
    """
    assert (query_weight is None) == (key_weight is None)
    assert angles.shape == (*mixed.shape[:2], 1, head_dim), "one angle for every position"
    out = _SplitAndTurn.apply(mixed, angles, query_weight, key_weight, num_groups, head_dim, eps)
    return cast(tuple[Tensor, Tensor, Tensor], out)


class _SplitAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        angles: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        num_groups: int,
        head_dim: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, angles = mixed.contiguous(), angles.contiguous()
        ctx.sizes = HeadSizes(num_groups, mixed.shape[-1] // (num_groups * head_dim) - 2, head_dim, eps)
        ctx.save_for_backward(needed_backward(mixed, query_weight), angles, query_weight, key_weight)
        return split_forward(mixed, angles, query_weight, key_weight, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        mixed, angles, query_weight, key_weight = ctx.saved_tensors
        d_mixed, d_weights = split_backward(mixed, angles, query_weight, key_weight, ctx.sizes, grad_outputs)
        d_query_weight = d_key_weight = None
        if d_weights is not None:
            d_query_weight, d_key_weight = d_weights.to(d_mixed.dtype)
        return d_mixed, None, d_query_weight, d_key_weight, None, None, None


class HeadSizes(NamedTuple):
    """How a joined projection is made up."""

    num_groups: int
    queries: int
    """Query heads of a group."""
    head_dim: int
    eps: float
    """Of the norms over queries and keys."""


def split_forward(
    mixed: Tensor, angles: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, sizes: HeadSizes
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`split_and_turn`, for contiguous tensors and without gradients."""
    s, b, _ = mixed.shape
    query = mixed.new_empty(s, b, sizes.num_groups * sizes.queries, sizes.head_dim)
    key, value = (mixed.new_empty(s, b, sizes.num_groups, sizes.head_dim) for _ in range(2))
    _split_forward[_grid(mixed, sizes)](
        mixed, angles, query_weight, key_weight, query, key, value, s * b, sizes.eps,
        **_constants(sizes, query_weight is not None),
    )  # fmt: skip
    return query, key, value


def needed_backward(mixed: Tensor, query_weight: Tensor | None) -> Tensor | None:
    """What :func:`split_backward` needs of the joined projection: norms their input, turning back nothing."""
    return None if query_weight is None else mixed


def split_backward(
    mixed: Tensor | None,
    angles: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    sizes: HeadSizes,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`split_forward`.

    Args:
        mixed: Its input, or None where it normalised nothing.
        angles: Its input.
        query_weight: Its input.
        key_weight: Its input.
        sizes: Its input.
        gradients: Of queries, keys and values.

    Returns: Gradient of `mixed`, and those of both weights, [2, d] float32, or None.
    """
    d_query, d_key, d_value = (gradient.contiguous() for gradient in gradients)
    width = sizes.num_groups * (sizes.queries + 2) * sizes.head_dim
    d_mixed = d_query.new_empty(*d_query.shape[:2], width)
    grid = _grid(d_mixed, sizes)
    d_weights = None
    if query_weight is not None:
        d_weights = d_mixed.new_empty(grid[0] * grid[1], 2, sizes.head_dim, dtype=torch.float32)
    source = d_mixed if mixed is None else mixed
    _split_backward[grid](
        source, angles, query_weight, key_weight, d_query, d_key, d_value, d_mixed, d_weights,
        d_mixed.shape[0] * d_mixed.shape[1], sizes.eps, **_constants(sizes, query_weight is not None),
    )  # fmt: skip
    return d_mixed, None if d_weights is None else d_weights.sum(dim=0)


def _grid(mixed: Tensor, sizes: HeadSizes) -> tuple[int, int]:
    return -(-mixed.shape[0] * mixed.shape[1] // ROWS), sizes.num_groups


@cache
def _constants(sizes: HeadSizes, has_norm: bool) -> dict[str, Any]:
    half = sizes.head_dim // 2
    return {
        "QUERIES": sizes.queries, "HALF": half, "BLOCK": triton.next_power_of_2(half), "ROWS": ROWS,
        "HAS_NORM": has_norm, "num_warps": WARPS,
    }  # fmt: skip


# Below, a tile is [ROWS, BLOCK]: one half of a head at some positions.


@triton.jit
def _tile(start, stride, rows, lanes):
    return start + rows[:, None].to(tl.int64) * stride + lanes[None, :]


@triton.jit
def _inverse_rms(first, second, eps, HALF: tl.constexpr):
    mean = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
    return 1.0 / tl.sqrt(mean + eps)[:, None]


@triton.jit
def _turn_forward(
    source, target, weight, stride, target_stride, rows, lanes, inside, cos, sin, eps,
    HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    places = _tile(source, stride, rows, lanes)
    first = tl.load(places, inside, 0.0).to(tl.float32)
    second = tl.load(places + HALF, inside, 0.0).to(tl.float32)
    if HAS_NORM:
        scale = _inverse_rms(first, second, eps, HALF)
        first = first * scale * tl.load(weight + lanes, lanes < HALF, 0.0).to(tl.float32)[None, :]
        second = second * scale * tl.load(weight + HALF + lanes, lanes < HALF, 0.0).to(tl.float32)[None, :]
    places = _tile(target, target_stride, rows, lanes)
    tl.store(places, first * cos - second * sin, inside)
    tl.store(places + HALF, second * cos + first * sin, inside)


@triton.jit
def _split_forward(
    mixed, angles, query_weight, key_weight, query, key, value, num_rows, eps,
    QUERIES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    lanes = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (lanes < HALF)[None, :]
    angle = tl.load(_tile(angles, 2 * HALF, rows, lanes), inside, 0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    d = 2 * HALF
    stride = num_groups * (QUERIES + 2) * d
    source = mixed + group * (QUERIES + 2) * d
    for head in range(QUERIES):
        target = query + (group * QUERIES + head) * d
        _turn_forward(
            source + head * d, target, query_weight, stride, num_groups * QUERIES * d,
            rows, lanes, inside, cos, sin, eps, HALF, HAS_NORM,
        )  # fmt: skip
    _turn_forward(
        source + QUERIES * d, key + group * d, key_weight, stride, num_groups * d,
        rows, lanes, inside, cos, sin, eps, HALF, HAS_NORM,
    )  # fmt: skip
    places = _tile(source + (QUERIES + 1) * d, stride, rows, lanes)
    targets = _tile(value + group * d, num_groups * d, rows, lanes)
    tl.store(targets, tl.load(places, inside, 0.0), inside)
    tl.store(targets + HALF, tl.load(places + HALF, inside, 0.0), inside)


@triton.jit
def _turn_backward(
    gradient, source, target, weight, gradient_stride, stride, rows, lanes, inside, cos, sin, eps, d_first, d_second,
    HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one head; `d_first` and `d_second` are what the norm's weight got so far, a tile: rows are
    summed once at the end, as warps wait for each other there.
    """
    places = _tile(gradient, gradient_stride, rows, lanes)
    upper = tl.load(places, inside, 0.0).to(tl.float32)
    lower = tl.load(places + HALF, inside, 0.0).to(tl.float32)
    first, second = upper * cos + lower * sin, lower * cos - upper * sin
    if HAS_NORM:
        places = _tile(source, stride, rows, lanes)
        x1 = tl.load(places, inside, 0.0).to(tl.float32)
        x2 = tl.load(places + HALF, inside, 0.0).to(tl.float32)
        scale = _inverse_rms(x1, x2, eps, HALF)
        x1, x2 = x1 * scale, x2 * scale
        d_first += first * x1
        d_second += second * x2
        first = first * tl.load(weight + lanes, lanes < HALF, 0.0).to(tl.float32)[None, :]
        second = second * tl.load(weight + HALF + lanes, lanes < HALF, 0.0).to(tl.float32)[None, :]
        along = tl.sum(first * x1 + second * x2, axis=1)[:, None] / (2 * HALF)
        first, second = scale * (first - x1 * along), scale * (second - x2 * along)
    places = _tile(target, stride, rows, lanes)
    tl.store(places, first, inside)
    tl.store(places + HALF, second, inside)
    return d_first, d_second


@triton.jit
def _split_backward(
    mixed, angles, query_weight, key_weight, d_query, d_key, d_value, d_mixed, d_weights, num_rows, eps,
    QUERIES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    lanes = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (lanes < HALF)[None, :]
    angle = tl.load(_tile(angles, 2 * HALF, rows, lanes), inside, 0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    d = 2 * HALF
    stride = num_groups * (QUERIES + 2) * d
    offset = group * (QUERIES + 2) * d
    zeros = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    d_first, d_second = zeros, zeros
    for head in range(QUERIES):
        d_first, d_second = _turn_backward(
            d_query + (group * QUERIES + head) * d, mixed + offset + head * d, d_mixed + offset + head * d,
            query_weight, num_groups * QUERIES * d, stride, rows, lanes, inside, cos, sin, eps,
            d_first, d_second, HALF, HAS_NORM,
        )  # fmt: skip
    key_place = offset + QUERIES * d
    d_first_key, d_second_key = _turn_backward(
        d_key + group * d, mixed + key_place, d_mixed + key_place, key_weight,
        num_groups * d, stride, rows, lanes, inside, cos, sin, eps, zeros, zeros, HALF, HAS_NORM,
    )  # fmt: skip
    places = _tile(d_value + group * d, num_groups * d, rows, lanes)
    targets = _tile(d_mixed + key_place + d, stride, rows, lanes)
    tl.store(targets, tl.load(places, inside, 0.0), inside)
    tl.store(targets + HALF, tl.load(places + HALF, inside, 0.0), inside)
    if HAS_NORM:
        out = d_weights + (tl.program_id(0) * num_groups + group) * 2 * d + lanes
        tl.store(out, tl.sum(d_first, axis=0), lanes < HALF)
        tl.store(out + HALF, tl.sum(d_second, axis=0), lanes < HALF)
        tl.store(out + d, tl.sum(d_first_key, axis=0), lanes < HALF)
        tl.store(out + d + HALF, tl.sum(d_second_key, axis=0), lanes < HALF)
