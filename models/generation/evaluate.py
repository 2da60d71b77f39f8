# SPDX-License-Identifier: Apache-2.0
"""Every answer of a held-out dataset asked again, and scored.

Exact match and token F1 are SQuAD's (lower case, without punctuation and English articles), as torchmetrics computes
them. Text without spaces between words counts as one token.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched

from torchmetrics.functional.text import squad

from models.contract.evaluation import EvaluationItem, kind_of_truth
from models.datasets.sample import Sample, SampleRejected
from models.generation.request import Answer, requests_of_sample

logger = logging.getLogger(__name__)

Ask = Callable[[Sequence[Sample]], list[Answer]]
"""Answers one batch of requests."""


def evaluate_samples(samples: Iterable[Sample], ask: Ask, *, batch_size: int) -> Iterator[EvaluationItem]:
    """Ask every question of every sample and score the answers.

    Earlier turns of a conversation are shown with their true answers.

    Args:
        samples: Held-out samples.
        ask: Answers a batch.
        batch_size: Requests at a time.
    """
    asked = (request for sample in samples for request in requests_of_sample(sample))
    for batch in batched(asked, batch_size):
        answers = ask([request for request, _, _ in batch])
        for (request, question, truth), answer in zip(batch, answers, strict=True):
            exact, f1 = score_text(answer.text, truth)
            yield EvaluationItem(
                key=request.key,
                question=question,
                truth=truth,
                answer=answer.text,
                kind=kind_of_truth(truth),
                media=tuple(medium.kind for medium in request.media),
                is_exact=exact,
                token_f1=f1,
                num_new_tokens=len(answer.token_ids),
                is_finished=answer.is_finished,
            )


def score_text(answer: str, truth: str) -> tuple[bool, float]:
    """Exact match and token F1 in 0..1 of one answer."""
    scores = squad(
        [{"prediction_text": answer, "id": "0"}],
        [{"answers": {"answer_start": [0], "text": [truth]}, "id": "0"}],
    )
    return bool(scores["exact_match"] == 100), min(float(scores["f1"]) / 100, 1.0)


def usable_samples(samples: Iterable[Sample | SampleRejected], rejected: list[str]) -> Iterator[Sample]:
    """Pass samples on; what was rejected is named in `rejected` and left out."""
    for sample in samples:
        if isinstance(sample, SampleRejected):
            rejected.append(str(sample))
            logger.warning("sample left out: %s", sample)
        else:
            yield sample
