# SPDX-License-Identifier: Apache-2.0
"""What a model answered on held-out samples: one JSON file, written by the generation program, read by the gate.

An item is one assistant turn of the dataset. Items whose truth is a sentence are captions, scored by token F1; the
others are answers, scored by exact match. Both scores are kept for every item.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.contract.errors import DataError
from models.contract.whole_file import write_whole

EVALUATION_SCHEMA_VERSION = 1
SENTENCE_ENDS = (".", "。", "!", "！")
STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EvaluationItem(BaseModel):
    """One question, its truth and what the model said."""

    model_config = STRICT
    key: str
    """`<sample key>#<turn index>`."""
    question: str
    truth: str
    answer: str
    kind: Literal["answer", "caption"]
    media: tuple[Literal["image", "video", "audio"], ...]
    """Kinds of the media that the model was shown, in order."""
    is_exact: bool
    token_f1: float = Field(ge=0.0, le=1.0)
    num_new_tokens: int = Field(ge=0)
    is_finished: bool
    """False: the answer was cut at the limit of new tokens."""


class Evaluation(BaseModel):
    """All items of one checkpoint on one dataset."""

    model_config = STRICT
    schema_version: Literal[1] = EVALUATION_SCHEMA_VERSION
    checkpoint: str
    checkpoint_fingerprint: str
    family: str
    engine: Literal["transformers", "megatron"]
    dataset: str
    split: str
    blank_images: bool
    max_new_tokens: int
    temperature: float
    seed: int
    num_rejected: int = 0
    """Samples of the split that could not be used."""
    items: tuple[EvaluationItem, ...]


class Scores(BaseModel):
    """Averages over items that come with a picture, a film or a sound."""

    model_config = STRICT
    num_answers: int
    num_captions: int
    accuracy: float | None
    """Share of answers that are exactly right; None without answers."""
    chance_accuracy: float | None
    """What the best constant answer to each question text scores on the same items: no looking needed."""
    caption_f1: float | None
    """Mean token F1 of captions; None without captions."""


def kind_of_truth(truth: str) -> Literal["answer", "caption"]:
    """A truth that is a sentence is a caption."""
    return "caption" if truth.strip().endswith(SENTENCE_ENDS) else "answer"


def score_items(items: Iterable[EvaluationItem]) -> Scores:
    """Average the items that carry media; text-only ones say nothing about seeing."""
    seen = [item for item in items if item.media]
    answers = [item for item in seen if item.kind == "answer"]
    captions = [item for item in seen if item.kind == "caption"]
    return Scores(
        num_answers=len(answers),
        num_captions=len(captions),
        accuracy=sum(item.is_exact for item in answers) / len(answers) if answers else None,
        chance_accuracy=chance_accuracy(answers) if answers else None,
        caption_f1=sum(item.token_f1 for item in captions) / len(captions) if captions else None,
    )


def chance_accuracy(answers: list[EvaluationItem]) -> float:
    """Accuracy of always giving each question its most frequent truth, on these very items."""
    truths: dict[str, Counter[str]] = defaultdict(Counter)
    for item in answers:
        truths[item.question][item.truth.strip().casefold()] += 1
    return sum(counts.most_common(1)[0][1] for counts in truths.values()) / len(answers)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write the file, whole or not at all."""
    write_whole(path, json.dumps(evaluation.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Read what :func:`write_evaluation` wrote.

    Raises:
        DataError: missing, half-written, or of another schema.
    """
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "evaluation file not found", where=str(path), fix="run `qwen-harness generate evaluate` first"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise DataError(
            "not an evaluation file of this version",
            where=str(path),
            got=f"{'.'.join(str(part) for part in first['loc']) or 'file'}: {first['msg']}",
            fix="write it again with `qwen-harness generate evaluate`",
        ) from None
