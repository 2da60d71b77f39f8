# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn.functional import cross_entropy

from models.common.kernels import cross_entropy as kernel


class OneRank:
    """A group that nothing is exchanged in."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.mark.parametrize(("shape", "size"), [((5, 1), 30), ((2, 3), 8192), ((1, 1), 8200), ((3, 2), 1)])
def test_losses_and_gradients_equal_plain_torch(
    device: torch.device, shape: tuple[int, int], size: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(*shape, size, generator=generator) * 5).to(device).requires_grad_()
    labels = torch.randint(0, size, shape, generator=generator).to(device)
    weights = torch.randn(shape, generator=generator).to(device)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(shape)
    (wanted,) = torch.autograd.grad(expected, logits, weights)
    losses = kernel.token_losses(logits * 1.0, labels, OneRank())
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(losses, logits, weights)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_impossible_tokens_have_no_share(device: torch.device) -> None:
    logits = torch.tensor([[[float("-inf"), 0.0, float("-inf"), 0.0]]], device=device)
    losses = kernel.token_losses(logits, torch.tensor([[1]], device=device), OneRank())
    torch.testing.assert_close(losses, torch.full((1, 1), 2.0, device=device).log())
