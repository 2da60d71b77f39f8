# SPDX-License-Identifier: Apache-2.0
"""From per-token losses to the number that is optimised and reported.

Both reductions are a sum over a denominator that is summed over the whole global batch, so that the gradient and
the reported number are the same function whatever the layout and the micro-batching:

    per_token    sum of token losses                   / number of supervised tokens
    per_sample   sum over samples of their token mean  / number of samples with a supervised token
"""

from typing import Literal

import torch
from torch import Tensor

from models.common.batch import IGNORED_LABEL, Batch
from models.common.transfer import to_device

Reduction = Literal["per_token", "per_sample"]


def sample_index(batch: Batch) -> Tensor:
    """Which sample each position belongs to, [b, s] int64; a packed row counts its sub-sequences."""
    b, s = batch.input_ids.shape
    device = batch.input_ids.device
    if batch.cu_seqlens is None:
        return torch.arange(b, device=device)[:, None].expand(b, s)
    ends = to_device(batch.cu_seqlens[1:].long(), device)
    index = torch.bucketize(torch.arange(s, device=device), ends, right=True)
    return index[None]  # the last end is s, so every position falls in a sub-sequence


def loss_weights(batch: Batch, reduction: Reduction) -> tuple[Tensor, int]:
    """Weight of every position and this micro-batch's share of the denominator.

    Returns: weights [b, s] float32, zero where the label is ignored; the denominator as a plain number.
    """
    if batch.labels is None:
        raise ValueError("a batch without labels has no loss")
    is_supervised = batch.labels != IGNORED_LABEL
    if reduction == "per_token":
        return is_supervised.float(), batch.num_supervised_tokens
    index = sample_index(batch)
    num_samples = batch.input_ids.shape[0] if batch.cu_seqlens is None else batch.cu_seqlens.numel() - 1
    counts = torch.zeros(num_samples, device=index.device).scatter_add_(
        0, index.reshape(-1), is_supervised.reshape(-1).float()
    )
    weights = torch.where(is_supervised, 1.0 / counts.clamp(min=1.0)[index], 0.0)
    return weights, int((counts > 0).sum())


def loss_denominator(batch: Batch, reduction: Reduction) -> int:
    """This micro-batch's share of the denominator, from the batch on the CPU."""
    if reduction == "per_token":
        return batch.num_supervised_tokens
    return loss_weights(batch, reduction)[1]
