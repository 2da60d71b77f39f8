# SPDX-License-Identifier: Apache-2.0
"""The engine under the weight tables: any rows of a Megatron tensor from HF tensors, and the other way round."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.common.weight_rules import HfTensor, Piece, Shape, WeightRule

ReadRows = Callable[[str, int, int], torch.Tensor]
"""`read(name, start, stop)`: rows of a tensor as it is stored."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor: first element and size on every axis."""

    start: Shape
    size: Shape

    def intersect(self, other: "Box") -> "Box | None":
        """What the two share, or None."""
        # Most boxes lie apart on the first axis, and this is asked for every piece of a tensor and every block.
        if self.start and (
            self.start[0] >= other.start[0] + other.size[0] or other.start[0] >= self.start[0] + self.size[0]
        ):
            return None
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        if any(low >= high for low, high in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(high - low for low, high in zip(start, stop, strict=True)))

    def slices(self, origin: Shape) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element is at `origin`."""
        return tuple(
            slice(low - base, low - base + extent)
            for low, base, extent in zip(self.start, origin, self.size, strict=True)
        )


def row_box(shape: Shape, start: int, stop: int) -> Box:
    """Rows `[start, stop)` of a tensor."""
    return Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))


def read_box(rule: WeightRule, box: Box, read: ReadRows, out: torch.Tensor) -> None:
    """Fill `out` (shape `box.size`) with that box of the rule's Megatron tensor.

    Values are converted to `out`'s dtype. Rows past the rule's shape (vocabulary padding) become zero.

    Args:
        rule: What the Megatron tensor is made of.
        box: Which part of it.
        read: Reads rows of HF tensors.
        out: Where to put it.
    """
    if box.intersect(Box((0,) * len(rule.shape), rule.shape)) != box:
        out.zero_()
    for piece in rule.pieces:
        shared = box.intersect(Box(piece.target_start, piece.size))
        if shared is not None:
            value = _read_viewed(rule.sources[piece.source], _to_source(piece, shared, rule), read)
            out[shared.slices(box.start)].copy_(value.reshape(shared.size))


def read_megatron_rows(
    rule: WeightRule, start: int, stop: int, read: ReadRows, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of the rule's Megatron tensor. A tensor that is copied as it is costs no copy in memory.

    Args:
        rule: What the Megatron tensor is made of.
        start: First row.
        stop: Row after the last.
        read: Reads rows of HF tensors.
        dtype: Number format of the result.
    """
    box = row_box(rule.shape, start, stop)
    parts = [
        (piece, shared)
        for piece in rule.pieces
        if (shared := box.intersect(Box(piece.target_start, piece.size)))
    ]
    if [shared for _, shared in parts] == [box]:  # one piece has it all: no copy
        piece = parts[0][0]
        value = _read_viewed(rule.sources[piece.source], _to_source(piece, box, rule), read)
        return value.to(dtype).reshape(box.size).contiguous()
    out = torch.empty(box.size, dtype=dtype)
    read_box(rule, box, read, out)
    return out


def read_hf_rows(
    rule: WeightRule, source: int, start: int, stop: int, read: ReadRows, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of HF tensor number `source` of a rule, as it lies on disk, from the Megatron tensor.

    Args:
        rule: What the Megatron tensor is made of.
        source: Index into the rule's sources.
        start: First row.
        stop: Row after the last.
        read: Reads rows of Megatron tensors.
        dtype: Number format of the result.
    """
    hf = rule.sources[source]
    rank = len(hf.viewed_shape)
    box = row_box(hf.viewed_shape, start, stop)
    if len(rule.pieces) == 1:
        value = read(rule.key, start, stop).to(dtype)
        value = value.transpose(-1, -2).contiguous() if hf.view == "transposed" else value
        return value.reshape(stop - start, *hf.shape[1:])
    parts = [
        (piece, shared)
        for piece in rule.pieces
        if piece.source == source and (shared := box.intersect(Box(piece.source_start, piece.size[-rank:])))
    ]
    if [shared for _, shared in parts] == [box]:  # one piece has it all: no copy
        out = _read_placed(rule, *parts[0], read).to(dtype).reshape(box.size)
    else:
        out = torch.empty(box.size, dtype=dtype)
        for piece, shared in parts:
            value = _read_placed(rule, piece, shared, read)
            out[shared.slices(box.start)].copy_(value.reshape(shared.size))
    if hf.view == "transposed":
        out = out.transpose(-1, -2).contiguous()
    return out.reshape(stop - start, *hf.shape[1:])


def _read_placed(rule: WeightRule, piece: Piece, shared: Box, read: ReadRows) -> torch.Tensor:
    """The part of the Megatron tensor where a part of a piece, in the viewed HF tensor's coordinates, lies."""
    place = _to_target(piece, shared, len(shared.size))
    value = read(rule.key, place.start[0], place.start[0] + place.size[0])
    return value[place.slices((place.start[0], *(0 for _ in place.start[1:])))]


def _to_source(piece: Piece, shared: Box, rule: WeightRule) -> Box:
    """A part of a piece, from Megatron coordinates to the viewed HF tensor's."""
    rank = len(rule.sources[piece.source].viewed_shape)
    offset = tuple(low - base for low, base in zip(shared.start, piece.target_start, strict=True))[-rank:]
    return Box(
        tuple(low + step for low, step in zip(piece.source_start, offset, strict=True)), shared.size[-rank:]
    )


def _to_target(piece: Piece, shared: Box, rank: int) -> Box:
    """A part of a piece, from the viewed HF tensor's coordinates to Megatron's."""
    lead = len(piece.size) - rank
    offset = tuple(low - base for low, base in zip(shared.start, piece.source_start, strict=True))
    start = tuple(base + step for base, step in zip(piece.target_start[lead:], offset, strict=True))
    return Box(piece.target_start[:lead] + start, (1,) * lead + shared.size)


def _read_viewed(hf: HfTensor, box: Box, read: ReadRows) -> torch.Tensor:
    """A box of a HF tensor, seen through its view. Reads the rows it needs, no others."""
    value = read(hf.name, box.start[0], box.start[0] + box.size[0])
    if hf.view == "flat":
        value = value.reshape(value.shape[0], -1)
    elif hf.view == "transposed":
        value = value.transpose(-1, -2)
    return value[box.slices((box.start[0], *(0 for _ in box.start[1:])))]
