# SPDX-License-Identifier: Apache-2.0
"""How Hugging Face tensors make up Megatron tensors, as data. Torch-free.

A rule names one Megatron tensor and lists *pieces*: boxes of HF tensors that are, element for element, boxes of the
Megatron tensor. Copying, interleaving query groups, gluing gate and up, stacking experts are all lists of boxes. So
one small engine reads any region of a Megatron tensor from a checkpoint, writes any HF tensor from a Megatron tensor,
and can prove that nothing is missing and nothing is counted twice.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from models.contract.errors import WeightMappingError

Shape = tuple[int, ...]
View = Literal["same", "flat", "transposed"]
"""How to look at a HF tensor: as it is, with every axis but the first flattened, or (from three axes on) with the last
two swapped. The first axis always stays, so rows on disk are rows of the view."""
ExpertLayout = Literal["fused", "fused_transposed", "per_expert"]
"""`fused`: the hub's [E, H, 2I] and [E, I, H]. `fused_transposed`: [E, 2I, H] and [E, H, I], which transformers 5
writes under the same names. `per_expert`: one tensor for each expert and projection."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor of the checkpoint as it lies on disk."""

    name: str
    shape: Shape
    view: View = "same"

    @property
    def viewed_shape(self) -> Shape:
        """Shape after the view."""
        if self.view == "flat":
            return (self.shape[0], math.prod(self.shape[1:]))
        if self.view == "transposed":
            return (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self.shape


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that a HF tensor and a Megatron tensor share.

    `size` has the Megatron tensor's rank. A HF tensor of lower rank lacks the leading axes, where the size is 1.
    """

    source: int
    """Index into the rule's `sources`."""
    source_start: Shape
    """First element in the viewed HF tensor."""
    target_start: Shape
    """First element in the Megatron tensor."""
    size: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRule:
    """One Megatron tensor and the HF tensors it is made of."""

    key: str
    """Key of the sharded checkpoint, equal to the global (unsharded) parameter name."""
    shape: Shape
    """Global shape, without vocabulary padding."""
    sources: tuple[HfTensor, ...]
    pieces: tuple[Piece, ...]
    copies: tuple[HfTensor, ...] = ()
    """HF names under which the same tensor may be stored again (a tied output layer)."""
    pads_rows: bool = False
    """True where Megatron may append zero rows (vocabulary tensors)."""

    @property
    def num_elements(self) -> int:
        """Elements of the Megatron tensor."""
        return math.prod(self.shape)


def copy(
    key: str,
    name: str,
    shape: Shape,
    *,
    view: View = "same",
    pads_rows: bool = False,
    copies: Sequence[str] = (),
) -> WeightRule:
    """The HF tensor is the Megatron tensor, seen through `view`. `shape` is the shape on disk."""
    source = HfTensor(name, shape, view)
    full = source.viewed_shape
    zero = (0,) * len(full)
    return WeightRule(
        key=key,
        shape=full,
        sources=(source,),
        pieces=(Piece(0, zero, zero, full),),
        copies=tuple(HfTensor(other, shape) for other in copies),
        pads_rows=pads_rows,
    )


def rows(
    key: str, sources: Sequence[tuple[str, int]], blocks: Iterable[tuple[int, int, int]], inner: Shape
) -> WeightRule:
    """Stack blocks of rows.

    Args:
        key: Megatron name.
        sources: Name and number of rows of each HF tensor, each `[rows, *inner]`.
        blocks: Source index, first row and number of rows, in the Megatron tensor's order.
        inner: Every axis but the first; empty for a bias.
    """
    tensors = tuple(HfTensor(name, (count, *inner)) for name, count in sources)
    rest = (0,) * len(inner)
    pieces, target = [], 0
    for source, start, count in blocks:
        pieces.append(Piece(source, (start, *rest), (target, *rest), (count, *inner)))
        target += count
    return WeightRule(key=key, shape=(target, *inner), sources=tensors, pieces=tuple(pieces))


def concatenate(key: str, sources: Sequence[tuple[str, int]], inner: Shape) -> WeightRule:
    """Glue whole tensors along the first axis: gate, then up."""
    return rows(key, sources, [(index, 0, count) for index, (_, count) in enumerate(sources)], inner)


def query_groups(
    key: str, names: tuple[str, str, str], *, num_heads: int, num_groups: int, head_dim: int, inner: Shape
) -> WeightRule:
    """Interleave q, k and v as Megatron wants them: for each query group its query heads, its key, its value.

    Args:
        key: Megatron name.
        names: HF names of q `[num_heads * head_dim, *inner]`, k and v `[num_groups * head_dim, *inner]`.
        num_heads: Query heads.
        num_groups: Key-value heads.
        head_dim: Size of a head.
        inner: `(hidden_size,)` for a weight, empty for a bias.
    """
    queries = num_heads // num_groups * head_dim
    blocks = []
    for group in range(num_groups):
        blocks.append((0, group * queries, queries))
        blocks.append((1, group * head_dim, head_dim))
        blocks.append((2, group * head_dim, head_dim))
    counts = (num_heads * head_dim, num_groups * head_dim, num_groups * head_dim)
    return rows(key, tuple(zip(names, counts, strict=True)), blocks, inner)


def fused_heads(key: str, name: str, *, num_heads: int, head_dim: int, inner: Shape) -> WeightRule:
    """Reorder a fused `[3 * heads * head_dim, *inner]` tensor from (q, k, v) to q, k, v for each head."""
    width = num_heads * head_dim
    blocks = [(0, part * width + head * head_dim, head_dim) for head in range(num_heads) for part in range(3)]
    return rows(key, ((name, 3 * width),), blocks, inner)


def experts(
    key: str,
    prefix: str,
    projections: tuple[str, ...],
    fused: str,
    *,
    layout: ExpertLayout,
    num_experts: int,
    out_features: int,
    in_features: int,
) -> WeightRule:
    """Stack experts to `[num_experts, len(projections) * out_features, in_features]`.

    Args:
        key: Megatron name.
        prefix: HF name of the experts, with the trailing dot.
        projections: Names of the projections of one expert, in Megatron's order along the second axis.
        fused: Name of the fused tensor.
        layout: How the checkpoint stores experts.
        num_experts: E.
        out_features: Rows of one projection.
        in_features: Columns of one projection.
    """
    total = len(projections) * out_features
    shape = (num_experts, total, in_features)
    if layout == "fused":
        return copy(key, prefix + fused, (num_experts, in_features, total), view="transposed")
    if layout == "fused_transposed":
        return copy(key, prefix + fused, shape)
    sources, pieces = [], []
    for expert in range(num_experts):
        for part, projection in enumerate(projections):
            target = (expert, part * out_features, 0)
            pieces.append(Piece(len(sources), (0, 0), target, (1, out_features, in_features)))
            sources.append(HfTensor(f"{prefix}{expert}.{projection}.weight", (out_features, in_features)))
    return WeightRule(key=key, shape=shape, sources=tuple(sources), pieces=tuple(pieces))


def hf_tensors(rules: Iterable[WeightRule]) -> dict[str, HfTensor]:
    """Every HF tensor that a table reads, by name; copies are left out."""
    return {source.name: source for rule in rules for source in rule.sources}


def check_table(rules: Sequence[WeightRule]) -> None:
    """Prove that every element on either side is covered exactly once.

    Raises:
        WeightMappingError: a name occurs twice, a box leaves its tensor, boxes overlap, or elements are left over.
    """
    seen: set[str] = set()
    for rule in rules:
        names = [rule.key, *(source.name for source in rule.sources)]
        twice = [name for index, name in enumerate(names) if name in seen or name in names[:index]]
        if twice:
            raise WeightMappingError(
                "a name occurs twice in the weight table", where=rule.key, got=", ".join(twice)
            )
        seen.update(names)
        _check_boxes(rule.key, rule.shape, [(piece.target_start, piece.size) for piece in rule.pieces])
        for index, source in enumerate(rule.sources):
            rank = len(source.viewed_shape)
            boxes = [(p.source_start, p.size[-rank:]) for p in rule.pieces if p.source == index]
            _check_boxes(source.name, source.viewed_shape, boxes)


def _check_boxes(name: str, shape: Shape, boxes: list[tuple[Shape, Shape]]) -> None:
    for start, size in boxes:
        if any(low < 0 or low + extent > full for low, extent, full in zip(start, size, shape, strict=True)):
            raise WeightMappingError(
                "a piece leaves its tensor", where=name, expected=str(shape), got=f"{start}+{size}"
            )
    covered = sum(math.prod(size) for _, size in boxes)
    if covered != math.prod(shape):
        raise WeightMappingError(
            "pieces do not cover their tensor",
            where=name,
            expected=f"{math.prod(shape)} elements",
            got=str(covered),
        )
    ordered = sorted(boxes)
    for (start, size), (other, _) in itertools.pairwise(ordered):
        # Tables cut along leading axes only, so overlapping boxes are neighbours in sorted order.
        if all(low <= high < low + extent for low, high, extent in zip(start, other, size, strict=True)):
            raise WeightMappingError("pieces overlap", where=name, got=f"{start}+{size} and {other}")
