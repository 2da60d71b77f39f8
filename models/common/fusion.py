# SPDX-License-Identifier: Apache-2.0
"""Bringing vision and audio tokens into the text sequence."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from models.common.batch import Batch
from models.contract.errors import ShapeError


def merge_tokens(
    embeddings: Tensor, tokens: Tensor, positions: Tensor, *, kind: str, batch: Batch | None = None
) -> Tensor:
    """Write vision or audio tokens over their placeholders.

    Out of place: the embedding's output is needed by its backward.

    Args:
        embeddings: Text embeddings, [s, b, h].
        tokens: In reading order, [m, h].
        positions: Index into the flattened b*s of each placeholder, [m] int64.
        kind: What the tokens are, for the error.
        batch: Whose they are; the error then names the sample.

    Returns: Embeddings with the tokens in place, [s, b, h].

    Raises:
        ShapeError: token and placeholder counts differ.
    """
    check_counts(tokens, positions, kind=kind, batch=batch)
    return spread(embeddings.transpose(0, 1).flatten(0, 1), tokens, positions, embeddings.shape)


def dense_features(tokens: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Features at their placeholders and zeros elsewhere, `shape` = [s, b, h]."""
    return spread(tokens.new_zeros(shape[0] * shape[1], shape[2]), tokens, positions, shape)


def spread(rows: Tensor, tokens: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Replace rows [b*s, h] by tokens at positions; returned as [s, b, h]."""
    filled = rows.index_copy(0, positions, tokens.to(rows.dtype))
    return filled.view(shape[1], shape[0], shape[2]).transpose(0, 1)


def check_counts(tokens: Tensor, positions: Tensor, *, kind: str, batch: Batch | None = None) -> None:
    """Raise ShapeError, naming the sample where `batch` is given, when tokens and placeholders differ in number."""
    if tokens.shape[0] != positions.shape[0]:
        raise ShapeError(
            f"{kind} tokens and placeholders do not match",
            where="micro-batch"
            if batch is None
            else f"micro-batch, {_first_apart(tokens, positions, kind, batch)}",
            expected=f"{positions.shape[0]} tokens, one for each placeholder",
            got=f"{tokens.shape[0]}",
            fix="check the number of media and the placeholders of the samples",
        )


def _first_apart(tokens: Tensor, positions: Tensor, kind: str, batch: Batch) -> str:
    """The first sample whose placeholders end where no medium does; only an error pays for this."""
    if batch.cu_seqlens is None:
        owner, count = positions // batch.input_ids.shape[1], batch.input_ids.shape[0]
    else:
        bounds = batch.cu_seqlens[1:].to(positions.device)
        owner, count = torch.bucketize(positions, bounds, right=True), batch.cu_seqlens.numel() - 1
    placeholders = torch.bincount(owner, minlength=count).cpu()
    names = [
        f"sample {number}" + (f" ({batch.sample_keys[number]})" if number < len(batch.sample_keys) else "")
        for number in range(count)
    ]
    if kind == "vision" and batch.grid_thw is not None:
        patches = batch.grid_thw.prod(dim=1)
        media_ends = {0, *(patches.cumsum(0) * tokens.shape[0] // patches.sum()).tolist()}
        for name, end in zip(names, placeholders.cumsum(0).tolist(), strict=True):
            if end not in media_ends:
                return name
        return f"media behind the last placeholder of {names[-1]}"
    seen = zip(names, placeholders.tolist(), strict=True)
    return "placeholders: " + ", ".join(f"{name} {number}" for name, number in seen if number)


def with_zero_gradients(hidden_states: Tensor, parameters: Iterable[Parameter]) -> Tensor:
    """The same values, and a zero gradient for every trainable one of these parameters.

    For a tower that a micro-batch has no media for: data parallelism waits for the gradient of every parameter.
    """
    return cast(Tensor, _ZeroGradients.apply(hidden_states, *(p for p in parameters if p.requires_grad)))


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = grad_outputs
        return gradient, *_zeros(ctx.parameters)


def _zeros(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A zero tensor for each, cut from one: autograd keeps such a gradient as it is, and one kernel fills them all."""
    if not parameters:
        return []
    sizes = [p.numel() for p in parameters]
    parts = parameters[0].new_zeros(sum(sizes)).split(sizes)
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
