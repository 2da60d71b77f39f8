# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import pytest

from models.datasets.sample import Medium, Sample, SampleRejected, Turn
from models.generation.evaluate import evaluate_samples, score_text, usable_samples
from models.generation.request import Answer

SAMPLE = Sample(
    "k", "",
    (Turn("user", "<image>\nColour?"), Turn("assistant", "red"), Turn("user", "And?"), Turn("assistant", "A red bar.")),
    (Medium("image", "image0.jpg", (b"",)),),
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        ("red", "red", True, 1.0),
        ("Red.", "red", True, 1.0),
        ("", "red", False, 0.0),
        ("A blue circle", "A red circle.", False, 0.5),  # without the article: one of two words
        ("red red", "red", False, 2 / 3),  # precision 1/2, recall 1
    ],
)
def test_text_scores_follow_squad(answer: str, truth: str, exact: bool, f1: float) -> None:
    found = score_text(answer, truth)
    assert found[0] is exact
    assert found[1] == pytest.approx(f1, abs=1e-6)


def test_every_answer_is_asked_with_the_true_history() -> None:
    batches: list[Sequence[Sample]] = []

    def ask(requests: Sequence[Sample]) -> list[Answer]:
        batches.append(requests)
        return [
            Answer(key=request.key, text="red", token_ids=(1, 2), num_prompt_tokens=3, is_finished=True)
            for request in requests
        ]

    items = list(evaluate_samples([SAMPLE, SAMPLE], ask, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 1]
    assert [(item.key, item.kind, item.is_exact) for item in items[:2]] == [
        ("k#1", "answer", True),
        ("k#3", "caption", False),
    ]
    assert batches[0][1].turns == SAMPLE.turns[:3]
    assert items[1].media == ("image",)


def test_rejected_samples_are_counted_and_left_out() -> None:
    rejected: list[str] = []
    kept = list(usable_samples([SAMPLE, SampleRejected("corrupt image", "k2: cut off")], rejected))
    assert kept == [SAMPLE]
    assert rejected == ["corrupt image: k2: cut off"]
