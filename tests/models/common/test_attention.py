# SPDX-License-Identifier: Apache-2.0
"""Packed attention against attention with a dense mask written out."""

import pytest
import torch

from models.common.attention import make_segments, packed_attention


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], causal: bool
) -> torch.Tensor:
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = sample[:, None] == sample
    if causal:
        mask &= torch.ones_like(mask).tril()
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("nqk,knd->qnd", weights, value)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 1, 7, 3, 1]], ids=["one", "equal", "mixed"])
def test_packed_attention_equals_a_dense_mask(lengths: list[int], causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    query = torch.randn(total, 6, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(total, 2, 8, generator=generator, requires_grad=True) for _ in range(2))
    ours = packed_attention(query, key, value, make_segments(lengths, torch.device("cpu")), is_causal=causal)
    theirs = dense(query, key, value, lengths, causal)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=generator)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


def test_make_segments_groups_equal_lengths() -> None:
    segments = make_segments([2, 3, 2], torch.device("cpu"))
    assert segments.cu_seqlens_q.tolist() == [0, 2, 5, 7]
    assert segments.max_seqlen_q == 3
    assert [(length, rows.tolist()) for length, rows in segments.groups] == [
        (2, [0, 1, 5, 6]),
        (3, [2, 3, 4]),
    ]


def test_rows_of_another_segment_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7, 2, 4, generator=generator) for _ in range(3))
    segments = make_segments([3, 4], torch.device("cpu"))
    before = packed_attention(query, key, value, segments, is_causal=False)
    key[3:] += 100
    assert torch.equal(before[:3], packed_attention(query, key, value, segments, is_causal=False)[:3])
