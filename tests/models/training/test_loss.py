# SPDX-License-Identifier: Apache-2.0
"""Weights and denominators of both reductions, small enough to check by eye."""

import dataclasses

import pytest
import torch

from models.common.batch import Batch
from models.training.loss import loss_denominator, loss_weights, sample_index

IGNORED = -100


def make_batch(labels: list[list[int]], cu_seqlens: list[int] | None = None) -> Batch:
    tensor = torch.tensor(labels)
    b, s = tensor.shape
    return Batch(
        input_ids=torch.zeros(b, s, dtype=torch.int64),
        labels=tensor,
        position_ids=torch.zeros(3, b, s, dtype=torch.int64),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        num_supervised_tokens=int((tensor != IGNORED).sum()),
    )


ROWS = make_batch([[7, 7, IGNORED, 7], [IGNORED, 7, IGNORED, IGNORED], [IGNORED] * 4])
PACKED = make_batch([[7, 7, 7, IGNORED, 7, IGNORED, IGNORED, IGNORED]], cu_seqlens=[0, 3, 6, 8])


def test_per_token_counts_every_supervised_token_alike() -> None:
    weights, denominator = loss_weights(ROWS, "per_token")
    assert weights.tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert denominator == loss_denominator(ROWS, "per_token") == 4


def test_per_sample_counts_every_sample_alike_and_leaves_out_one_without_labels() -> None:
    weights, denominator = loss_weights(ROWS, "per_sample")
    third = pytest.approx(1 / 3)
    assert weights.tolist() == [[third, third, 0, third], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert denominator == loss_denominator(ROWS, "per_sample") == 2


def test_per_sample_tells_packed_samples_apart() -> None:
    assert sample_index(PACKED).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    weights, denominator = loss_weights(PACKED, "per_sample")
    third = pytest.approx(1 / 3)
    assert weights.tolist() == [[third, third, third, 0, 1, 0, 0, 0]]
    assert denominator == 2


def test_packed_and_unpacked_samples_have_the_same_loss() -> None:
    losses = torch.arange(1.0, 5.0)
    rows = make_batch([[7, 7, IGNORED], [7, 7, IGNORED]])
    packed = make_batch([[7, 7, IGNORED, 7, 7, IGNORED]], cu_seqlens=[0, 3, 6])
    spread = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]])
    for reduction in ("per_token", "per_sample"):
        a, n = loss_weights(rows, reduction)
        b, m = loss_weights(packed, reduction)
        assert n == m
        assert (a * spread).sum() == (b * spread.reshape(1, -1)).sum()
    assert losses.sum() == spread.sum()


def test_a_batch_without_labels_has_no_loss() -> None:
    with pytest.raises(ValueError, match="without labels"):
        loss_weights(dataclasses.replace(ROWS, labels=None), "per_token")
