# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of every token over a vocabulary that may lie in parts on several ranks.

Forward reads the logits once; backward turns them into their gradient in place, so that the largest tensor of a step
exists once. TransformerEngine's does the latter in its forward pass and goes over the tensor a fourth time to multiply
by the weight of each token.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

BLOCK = 8192
"""Logits that a program holds at a time."""


def token_losses(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
    """Negative log-likelihood of each label. The logits are used up: backward overwrites them.

    Args:
        logits: This rank's part of the vocabulary, [..., v/tp].
        labels: Token ids of the whole vocabulary, [...] int64.
        group: Tensor-parallel ranks.

    Returns: [...] float32, the same on every rank.
    """
    return cast(Tensor, _TokenLosses.apply(logits, labels, group))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        rows = logits.contiguous().flatten(0, -2)
        size = rows.shape[1]
        local = labels.flatten() - group.rank() * size
        largest, total, chosen = (rows.new_empty(len(rows), dtype=torch.float32) for _ in range(3))
        _loss_forward[(len(rows),)](rows, local, largest, total, chosen, **_constants(size))
        if group.size() > 1:
            overall = largest.clone()
            distributed.all_reduce(overall, op=distributed.ReduceOp.MAX, group=group)
            sums = torch.stack((total * torch.exp(largest - overall), chosen))
            distributed.all_reduce(sums, group=group)
            largest, total, chosen = overall, *sums
        log_total = largest + total.log()
        ctx.save_for_backward(rows, local, log_total)
        ctx.shape = logits.shape
        return (log_total - chosen).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        rows, local, log_total = ctx.saved_tensors
        weights = grad_outputs[0].float().contiguous().flatten()
        size = rows.shape[1]
        _loss_backward[(len(rows), -(-size // BLOCK))](rows, local, log_total, weights, **_constants(size))
        return rows.view(ctx.shape), None, None


def _constants(size: int) -> dict[str, Any]:
    return {"SIZE": size, "BLOCK": BLOCK, "num_warps": 8}


@triton.jit
def _loss_forward(rows, labels, largest, total, chosen, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1e30, dtype=tl.float32)  # not -inf, which subtracted from itself is no number
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(rows + row * SIZE + start + lanes, start + lanes < SIZE, float("-inf")).to(tl.float32)
        new = tl.maximum(highest, x)
        sums = sums * tl.exp(highest - new) + tl.exp(x - new)
        highest = new
    overall = tl.max(highest)
    tl.store(largest + row, overall)
    tl.store(total + row, tl.sum(sums * tl.exp(highest - overall)))
    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < SIZE)
    tl.store(chosen + row, tl.load(rows + row * SIZE + label, is_here, 0.0).to(tl.float32))


@triton.jit
def _loss_backward(rows, labels, log_total, weights, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < SIZE
    x = tl.load(rows + row * SIZE + lanes, inside, float("-inf")).to(tl.float32)
    probability = tl.exp(x - tl.load(log_total + row))
    is_label = (lanes == tl.load(labels + row)).to(tl.float32)
    tl.store(rows + row * SIZE + lanes, (probability - is_label) * tl.load(weights + row), inside)
