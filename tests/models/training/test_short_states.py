# SPDX-License-Identifier: Apache-2.0
"""A step in pieces, by a stand-in for TransformerEngine's AdamW, which runs on GPUs only."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.training.short_states import pieces, step_in_pieces

SIZES = ((3, 5), (40,), (7,), (2, 2), (1,))


class GroupAdam:
    """Like TransformerEngine's: a group counts its steps, and all its moments are unpacked at once."""

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)
        ]
        self.state: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.unpacked: list[int] = []

    def step(self) -> None:
        """One step of every group."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            states = [self.state.get(p, (torch.zeros_like(p), torch.zeros_like(p))) for p in group["params"]]
            self.unpacked.append(sum(p.numel() for p in group["params"]))
            for p, (first, second) in zip(group["params"], states, strict=True):
                assert p.grad is not None
                first, second = 0.9 * first + 0.1 * p.grad, 0.99 * second + 0.01 * p.grad**2
                self.state[p] = (first.bfloat16().float(), second.bfloat16().float())
                corrected = first / (1 - 0.9 ** group["step"]), second / (1 - 0.99 ** group["step"])
                p.sub_(group["lr"] * corrected[0] / (corrected[1].sqrt() + 1e-8))


def make_parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in SIZES]


def stepped(optimizer: GroupAdam, parameters: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.clone() for parameter in parameters]


@pytest.mark.parametrize("piece", [1, 20, 10**9])
def test_pieces_step_to_the_same_place(piece: int) -> None:
    found = []
    for is_whole in (True, False):
        parameters = make_parameters()
        optimizer = GroupAdam([parameters[:3], [], parameters[3:]])
        if not is_whole:
            step_in_pieces(optimizer, piece=piece)
        groups = optimizer.param_groups
        found.append(stepped(optimizer, parameters))
        assert optimizer.param_groups is groups
        assert [group.get("step") for group in groups] == [3, None, 3]
        assert [len(group["params"]) for group in groups] == [3, 0, 2]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert max(optimizer.unpacked) <= max(piece, 40)


def test_groups_are_whole_again_after_a_step_that_failed() -> None:
    parameters = make_parameters()
    optimizer = GroupAdam([parameters])
    step_in_pieces(optimizer, piece=1)
    before = copy.copy(optimizer.param_groups)
    with pytest.raises(AssertionError):  # no gradients
        optimizer.step()
    assert optimizer.param_groups == before


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_pieces_are_the_whole_in_order(sizes: list[int], piece: int) -> None:
    tensors = [torch.empty(size) for size in sizes]
    found = list(pieces(tensors, piece))
    assert [id(tensor) for part in found for tensor in part] == [id(tensor) for tensor in tensors]
    assert all(part and (len(part) == 1 or sum(t.numel() for t in part) <= piece) for part in found)
