# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token, the same way for both engines.

Sampling is done by the Gumbel trick: adding Gumbel noise to the log-probabilities and taking the largest draws from
the softmax exactly. Each request draws its noise from a generator of its own, so that an answer depends on the seed
and on its key, and neither on the batch it was in nor on the engine that ran it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from models.generation.request import GenerationOptions


def make_generators(keys: Sequence[str], seed: int) -> list[torch.Generator]:
    """One generator a request, from the seed and its key."""
    digests = (hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in keys)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7])) for digest in digests]


def sampling_scores(
    logits: Tensor, generators: Sequence[torch.Generator], options: GenerationOptions
) -> Tensor:
    """Scores whose largest entry is the next token.

    Args:
        logits: [b, v].
        generators: One a row; each is advanced by one draw. Not touched when the temperature is 0.
        options: Temperature, top_k, top_p.

    Returns: [b, v] float32.
    """
    scores = logits.float()
    if options.temperature == 0.0:
        return scores
    scores = scores / options.temperature
    ids = torch.empty(scores.shape[0], 0, dtype=torch.long)  # the warpers do not look at it
    warpers: list[Any] = []
    if options.top_k:
        warpers.append(TopKLogitsWarper(min(options.top_k, scores.shape[1])))
    if options.top_p < 1.0:
        warpers.append(TopPLogitsWarper(options.top_p))
    for warper in warpers:
        scores = warper(ids, scores)
    uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in generators])
    noise = -torch.log(-torch.log(uniform.clamp(min=1e-20)))  # Gumbel(0, 1)
    return scores + noise.to(scores.device)
