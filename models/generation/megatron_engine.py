# SPDX-License-Identifier: Apache-2.0
"""Answers from our own model. Every token recomputes the whole sequence: no cache, no second code path to be wrong.

The prompt goes through the training data path (our chat rendering, media processing and position ids), so that equal
answers with transformers say that training and use see the same thing.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.common.batching import build_batch
from models.common.processing import process_image
from models.common.sequences import EncodedSample, encode_sample
from models.contract.architecture import Architecture
from models.contract.errors import DataError
from models.contract.families import family_part
from models.datasets.chat import insert_media
from models.datasets.sample import Sample
from models.generation.decoding import decode_media
from models.generation.request import Answer, GenerationOptions, check_context, check_modalities
from models.generation.sampling import make_generators, sampling_scores
from models.generation.tokens import pad_token, render_prompt
from models.generation.transformers_engine import OnToken, make_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronEngine:
    """A built and filled model, one process."""

    architecture: Architecture
    model: Any
    processor: Any
    device: torch.device
    end_tokens: tuple[int, ...]
    sequence_multiple_of: int = 1


@torch.no_grad()
def generate(
    engine: MegatronEngine,
    requests: Sequence[Sample],
    options: GenerationOptions,
    *,
    blank: bool = False,
    on_token: OnToken | None = None,
) -> list[Answer]:
    """Answer one batch of requests; see :func:`models.generation.transformers_engine.generate`."""
    family = family_part(engine.architecture.family, "data")
    check_modalities(requests, engine.architecture, family.MEDIA_KINDS)
    prompts = [encode_prompt(request, engine, blank=blank) for request in requests]
    limit = engine.architecture.text.max_position_embeddings
    for request, prompt in zip(requests, prompts, strict=True):
        check_context(request, prompt.length, limit)
    generators = make_generators([request.key for request in requests], options.seed)
    rows, new = list(prompts), [[] for _ in prompts]
    for _ in range(min(options.max_new_tokens, limit - max(prompt.length for prompt in prompts))):
        logits = _next_logits(engine, rows)
        tokens = sampling_scores(logits, generators, options).argmax(dim=-1).tolist()
        for row, token in enumerate(tokens):
            new[row].append(token)
            rows[row] = append_token(rows[row], token)
        if on_token is not None:
            on_token(tokens)
        if all(any(token in engine.end_tokens for token in row) for row in new):
            break
    return [
        make_answer(request, tokens, prompt.length, engine.processor, engine.end_tokens)
        for request, tokens, prompt in zip(requests, new, prompts, strict=True)
    ]


def encode_prompt(request: Sample, engine: MegatronEngine, *, blank: bool) -> EncodedSample:
    """A request as the training data path encodes it, with nothing to learn.

    Raises:
        DataError: a medium does not decode, or the processor refuses it.
    """
    family = family_part(engine.architecture.family, "data")
    process = {kind: getattr(family, f"process_{kind}") for kind in family.MEDIA_KINDS if kind != "image"}
    process["image"] = process_image
    items = []
    for medium, content in decode_media(request, engine.processor, blank=blank):
        try:
            items.append(process[medium.kind](content, engine.processor, engine.architecture))
        except ValueError as error:
            raise DataError(
                f"{medium.kind} cannot be used", where=f"{request.key}: {medium.name}", got=str(error)
            ) from None
    text = render_prompt(engine.processor, request)
    text = insert_media(engine.processor, text, items)
    ids = torch.tensor(engine.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    return encode_sample(request.key, ids, nothing, items, engine.architecture.tokens)


def append_token(sample: EncodedSample, token: int) -> EncodedSample:
    """The sequence with one more text token, whose position follows the last one's (a text token, too)."""
    after = sample.position_ids[:, -1:].amax(dim=0, keepdim=True) + 1
    return dataclasses.replace(
        sample,
        input_ids=torch.cat([sample.input_ids, torch.tensor([token])]),
        labels=torch.cat([sample.labels, sample.labels[-1:]]),
        position_ids=torch.cat([sample.position_ids, after.expand(3, 1)], dim=1),
    )


def _next_logits(engine: MegatronEngine, rows: Sequence[EncodedSample]) -> Tensor:
    """Logits [b, v] float32 behind the last token of every row."""
    batch = build_batch(rows, pad_token=pad_token(engine.processor), multiple_of=engine.sequence_multiple_of)
    batch = dataclasses.replace(batch, labels=None).to(engine.device)
    logits = engine.model(batch)  # [b, s, v]
    last = torch.tensor([row.length - 1 for row in rows], device=logits.device)
    return logits[torch.arange(len(rows), device=logits.device), last].float()
