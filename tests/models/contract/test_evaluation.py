# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from models.contract.errors import DataError
from models.contract.evaluation import (
    Evaluation,
    EvaluationItem,
    kind_of_truth,
    read_evaluation,
    score_items,
    write_evaluation,
)


def item(
    key: str, truth: str, answer: str, *, question: str = "Colour?", f1: float = 0.5, media: bool = True
) -> EvaluationItem:
    return EvaluationItem(
        key=key, question=question, truth=truth, answer=answer, kind=kind_of_truth(truth),
        media=("image",) if media else (), is_exact=truth == answer, token_f1=f1, num_new_tokens=1, is_finished=True,
    )  # fmt: skip


ITEMS = (
    item("a#1", "red", "red"),
    item("b#1", "red", "blue"),
    item("c#1", "blue", "blue"),
    item("d#1", "two", "two", question="How many?"),
    item("e#1", "A red bar.", "A red bar", f1=0.75),
    item("f#1", "red", "red", media=False),
)


def evaluation(**changes: object) -> Evaluation:
    values = {
        "checkpoint": "c", "checkpoint_fingerprint": "0", "family": "qwen3_vl", "engine": "transformers",
        "dataset": "d", "split": "val", "blank_images": False, "max_new_tokens": 8, "temperature": 0.0,
        "seed": 0, "items": ITEMS,
    }  # fmt: skip
    return Evaluation(**{**values, **changes})


def test_scores_count_only_what_was_seen() -> None:
    scores = score_items(ITEMS)
    assert (scores.num_answers, scores.num_captions) == (4, 1)
    assert (scores.accuracy, scores.caption_f1) == (0.75, 0.75)


def test_chance_is_the_best_constant_answer_to_each_question() -> None:
    assert score_items(ITEMS).chance_accuracy == 0.75  # red, red for Colour? and two for How many?


def test_scores_of_nothing_are_none() -> None:
    scores = score_items(ITEMS[5:])
    assert (scores.accuracy, scores.chance_accuracy, scores.caption_f1) == (None, None, None)


@pytest.mark.parametrize(
    ("truth", "kind"), [("red", "answer"), ("A red bar.", "caption"), ("一个红色的圆。", "caption")]
)
def test_a_sentence_is_a_caption(truth: str, kind: str) -> None:
    assert kind_of_truth(truth) == kind


def test_evaluation_survives_the_file(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "e.json", evaluation())
    assert read_evaluation(tmp_path / "e.json") == evaluation()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(DataError, match="not an evaluation file"):
        read_evaluation(tmp_path / "e.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found[\s\S]*nowhere.json"):
        read_evaluation(tmp_path / "nowhere.json")
