# SPDX-License-Identifier: Apache-2.0
"""Oracle: the same rearrangement written with torch reshapes."""

import dataclasses

import pytest
import torch

from models.common.weight_rules import (
    Piece,
    WeightRule,
    check_table,
    concatenate,
    copy,
    experts,
    fused_heads,
    query_groups,
)
from models.contract.errors import WeightMappingError
from models.conversion.regions import read_box, read_hf_rows, row_box


def numbered(shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + first


def make(rule: WeightRule) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """HF tensors with distinct elements and the Megatron tensor they give."""
    tensors = {source.name: numbered(source.shape, 1000 * index) for index, source in enumerate(rule.sources)}
    out = torch.empty(rule.shape)
    read_box(rule, row_box(rule.shape, 0, rule.shape[0]), lambda name, a, b: tensors[name][a:b], out)
    return tensors, out


def test_query_groups_interleaves_weight_and_bias() -> None:
    for inner in ((5,), ()):
        rule = query_groups("k", ("q", "k", "v"), num_heads=6, num_groups=2, head_dim=4, inner=inner)
        tensors, out = make(rule)
        q, k, v = (tensors[name].reshape(2, -1, *inner) for name in "qkv")
        assert torch.equal(out, torch.cat([q, k, v], dim=1).reshape(-1, *inner))


def test_fused_heads_reorders_thirds_to_heads() -> None:
    for inner in ((5,), ()):
        tensors, out = make(fused_heads("k", "qkv", num_heads=3, head_dim=4, inner=inner))
        expected = tensors["qkv"].reshape(3, 3, 4, *inner).transpose(0, 1).reshape(36, *inner)
        assert torch.equal(out, expected)


def test_concatenate_puts_gate_before_up() -> None:
    tensors, out = make(concatenate("k", (("gate", 3), ("up", 3)), (2,)))
    assert torch.equal(out, torch.cat([tensors["gate"], tensors["up"]]))


def test_copy_flattens_a_convolution() -> None:
    tensors, out = make(copy("k", "conv", (4, 3, 2, 2, 2), view="flat"))
    assert torch.equal(out, tensors["conv"].reshape(4, 24))


@pytest.mark.parametrize("layout", ["fused", "fused_transposed", "per_expert"])
def test_experts_stacks_every_layout_to_the_same_tensor(layout) -> None:
    E, H, I = 3, 5, 2  # noqa: E741
    gate, up = numbered((E, I, H)), numbered((E, I, H), 500)
    expected = torch.cat([gate, up], dim=1)
    stored = {
        "fused": {"x.gate_up_proj": expected.transpose(1, 2).contiguous()},
        "fused_transposed": {"x.gate_up_proj": expected},
        "per_expert": {f"x.{e}.{n}.weight": t[e] for e in range(E) for n, t in (("gate", gate), ("up", up))},
    }[layout]
    rule = experts(
        "k", "x.", ("gate", "up"), "gate_up_proj", layout=layout, num_experts=E, out_features=I, in_features=H
    )
    check_table([rule])
    out = torch.empty(rule.shape)
    read_box(rule, row_box(rule.shape, 0, E), lambda name, a, b: stored[name][a:b], out)
    assert torch.equal(out, expected)
    for index, source in enumerate(rule.sources):
        back = read_hf_rows(rule, index, 0, source.shape[0], lambda _, a, b: out[a:b], torch.float32)
        assert torch.equal(back, stored[source.name])


def test_any_box_equals_the_slice_of_the_whole() -> None:
    rule = query_groups("k", ("q", "k", "v"), num_heads=6, num_groups=2, head_dim=4, inner=(5,))
    tensors, whole = make(rule)
    for start in range(0, rule.shape[0], 3):
        for stop in range(start + 1, rule.shape[0] + 1, 5):
            out = torch.empty(stop - start, 5)
            read_box(rule, row_box(rule.shape, start, stop), lambda name, a, b: tensors[name][a:b], out)
            assert torch.equal(out, whole[start:stop])


def test_rows_beyond_the_rule_are_zero() -> None:
    rule = copy("k", "embed", (4, 3), pads_rows=True)
    tensors = {"embed": numbered((4, 3), 1)}
    out = torch.full((6, 3), float("nan"))
    read_box(rule, row_box((6, 3), 0, 6), lambda name, a, b: tensors[name][a:b], out)
    assert torch.equal(out[:4], tensors["embed"])
    assert torch.equal(out[4:], torch.zeros(2, 3))


def test_check_table_refuses_holes_overlaps_and_doubles() -> None:
    good = concatenate("k", (("gate", 3), ("up", 3)), (2,))
    check_table([good])
    first, second = good.pieces
    moved = dataclasses.replace(second, target_start=(2, 0))
    broken = {
        "do not cover": (first,),
        "overlap": (first, moved),
        "leaves": (first, Piece(1, (0, 0), (4, 0), (3, 2))),
    }
    for words, pieces in broken.items():
        with pytest.raises(WeightMappingError, match=words):
            check_table([dataclasses.replace(good, pieces=pieces)])
    with pytest.raises(WeightMappingError, match="twice"):
        check_table([good, good])
