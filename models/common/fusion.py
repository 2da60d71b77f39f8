# SPDX-License-Identifier: Apache-2.0
"""Bringing vision and audio tokens into the text sequence."""

import torch
from torch import Tensor

from models.contract.errors import ShapeError


def merge_tokens(embeddings: Tensor, tokens: Tensor, positions: Tensor, *, kind: str) -> Tensor:
    """Write vision or audio tokens over their placeholders.

    Out of place: the embedding's output is needed by its backward.

    Args:
        embeddings: Text embeddings, [s, b, h].
        tokens: In reading order, [m, h].
        positions: Index into the flattened b*s of each placeholder, [m] int64.
        kind: What the tokens are, for the error.

    Returns: Embeddings with the tokens in place, [s, b, h].

    Raises:
        ShapeError: token and placeholder counts differ.
    """
    check_counts(tokens, positions, kind=kind)
    return spread(embeddings.transpose(0, 1).flatten(0, 1), tokens, positions, embeddings.shape)


def dense_features(tokens: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Features at their placeholders and zeros elsewhere, `shape` = [s, b, h]."""
    return spread(tokens.new_zeros(shape[0] * shape[1], shape[2]), tokens, positions, shape)


def spread(rows: Tensor, tokens: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Replace rows [b*s, h] by tokens at positions; returned as [s, b, h]."""
    filled = rows.index_copy(0, positions, tokens.to(rows.dtype))
    return filled.view(shape[1], shape[0], shape[2]).transpose(0, 1)


def check_counts(tokens: Tensor, positions: Tensor, *, kind: str) -> None:
    """Raise ShapeError when there are more or fewer tokens than placeholders."""
    if tokens.shape[0] != positions.shape[0]:
        raise ShapeError(
            f"{kind} tokens and placeholders do not match",
            where="micro-batch",
            expected=f"{positions.shape[0]} tokens, one for each placeholder",
            got=f"{tokens.shape[0]}",
            fix="check the number of media and the placeholders of the samples",
        )
