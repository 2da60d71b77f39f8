# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
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


NUM_RANKS = 2


def losses_of_one_part(rank: int, folder: Path) -> None:
    """Losses, and gradients of this rank's half of the vocabulary; run in a process of its own."""
    store = distributed.FileStore(str(folder / "store"), NUM_RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    given = torch.load(folder / "given.pt")
    part = given["logits"].chunk(NUM_RANKS, dim=-1)[rank].clone().requires_grad_()
    losses = kernel.token_losses(part * 1.0, given["labels"], distributed.group.WORLD)
    (gradient,) = torch.autograd.grad(losses, part, given["weights"])
    torch.save((losses.detach(), gradient), folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_vocabulary_in_parts_equals_the_joined_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the processes run on the CPU, on a machine with a GPU too
    size = NUM_RANKS * (kernel.BLOCK + 8)
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(2, 3, size, generator=generator) * 5).requires_grad_()
    labels = torch.randint(0, size, (2, 3), generator=generator)
    labels[0, 0], labels[1, 2] = size // 2 - 1, size // 2  # on both sides of the cut
    weights = torch.randn(2, 3, generator=generator)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
    (wanted,) = torch.autograd.grad(expected, logits, weights)
    given = {"logits": logits.detach(), "labels": labels, "weights": weights}
    torch.save(given, tmp_path / "given.pt")
    multiprocessing.spawn(losses_of_one_part, (tmp_path,), nprocs=NUM_RANKS)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(NUM_RANKS)]
    for losses, _ in found:
        torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    joined = torch.cat([gradient for _, gradient in found], dim=-1)
    torch.testing.assert_close(joined, wanted, atol=1e-5, rtol=1e-5)
