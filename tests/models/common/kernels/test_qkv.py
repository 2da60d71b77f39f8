# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from models.common.kernels.qkv import split_and_turn

EPS = 1e-6


def plain(
    mixed: Tensor, angles: Tensor, weights: tuple[Tensor, Tensor] | None, num_groups: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch: split, norm, rotate halves."""
    s, b, width = mixed.shape
    heads = mixed.view(s, b, num_groups, -1, head_dim)
    queries = width // (num_groups * head_dim) - 2
    query, key, value = heads[..., :queries, :].flatten(2, 3), heads[..., queries, :], heads[..., -1, :]
    if weights is not None:
        query, key = (
            torch.nn.functional.rms_norm(part, (head_dim,), weight, EPS)
            for part, weight in zip((query, key), weights, strict=True)
        )
    return turn(query, angles), turn(key, angles), value


def turn(heads: Tensor, angles: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


@pytest.mark.parametrize(
    ("s", "b", "num_groups", "queries", "head_dim", "has_norm"),
    [
        (5, 1, 2, 3, 20, True),
        (37, 2, 3, 1, 16, True),
        (16, 1, 1, 8, 32, True),
        (9, 1, 4, 1, 10, False),
        (1, 3, 2, 2, 2, False),
    ],
)
def test_values_and_gradients_equal_plain_torch(
    device: torch.device, s: int, b: int, num_groups: int, queries: int, head_dim: int, has_norm: bool
) -> None:
    generator = torch.Generator().manual_seed(s)
    shape = (s, b, num_groups * (queries + 2) * head_dim)
    mixed = torch.randn(shape, generator=generator).to(device).requires_grad_()
    half = torch.randn(s, b, 1, head_dim // 2, generator=generator) * 100
    angles = torch.cat((half, half), dim=-1).to(device)
    weights = None
    if has_norm:
        first, second = (torch.randn(head_dim, generator=generator).to(device) for _ in range(2))
        weights = first.requires_grad_(), second.requires_grad_()
    ours = split_and_turn(
        mixed, angles, *(weights or (None, None)), num_groups=num_groups, head_dim=head_dim, eps=EPS
    )
    expected = plain(mixed, angles, weights, num_groups, head_dim)
    inputs = [mixed, *(weights or ())]
    gradients = [torch.randn(part.shape, generator=generator).to(device) for part in expected]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, gradients),
        torch.autograd.grad(expected, inputs, gradients),
        atol=1e-4,
        rtol=1e-5,
    )


def test_angles_of_other_positions_are_refused(device: torch.device) -> None:
    mixed = torch.zeros(4, 1, 24, device=device)
    with pytest.raises(AssertionError, match="one angle for every position"):
        split_and_turn(
            mixed, torch.zeros(3, 1, 1, 8, device=device), None, None, num_groups=1, head_dim=8, eps=EPS
        )
