# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from harness.gates.inference import judge_inference
from models.contract.evaluation import Evaluation, EvaluationItem

COLOURS = ("red", "green", "blue", "white")


def evaluation(
    share_right: float, *, blank: bool = False, checkpoint: str = "tuned", count: int = 200, seed: int = 0
) -> Evaluation:
    rng = random.Random(seed)
    truths = [COLOURS[index % 4] for index in range(count)]
    right = [index < share_right * count for index in range(count)]
    rng.shuffle(right)
    items = tuple(
        EvaluationItem(
            key=f"{index}#1", question="Colour?", truth=truth, answer=truth if hit else "?", kind="answer",
            media=("image",), is_exact=hit, token_f1=float(hit), num_new_tokens=1, is_finished=True,
        )
        for index, (truth, hit) in enumerate(zip(truths, right, strict=True))
    )  # fmt: skip
    return Evaluation(
        checkpoint=checkpoint, checkpoint_fingerprint=checkpoint, family="qwen3_vl", engine="transformers", dataset="d",
        split="val", blank_images=blank, max_new_tokens=8, temperature=0.0, seed=0, items=items,
    )  # fmt: skip


BASE = evaluation(0.1, checkpoint="base")
BLANK = evaluation(0.25, blank=True)


def statuses(base: Evaluation, tuned: Evaluation, blank: Evaluation) -> tuple[str, str]:
    improvement, blanked = judge_inference(base, tuned, blank)
    return improvement.status, blanked.status


def test_a_model_that_learnt_to_look_passes() -> None:
    improvement, blanked = judge_inference(BASE, evaluation(0.95), BLANK)
    assert (improvement.status, blanked.status) == ("pass", "pass")
    assert improvement.effect == pytest.approx(0.85)
    assert blanked.details["blanked"]["chance_accuracy"] == 0.25


def test_a_model_that_learnt_nothing_fails() -> None:
    assert statuses(BASE, evaluation(0.12), BLANK)[0] == "fail"


def test_improvement_below_the_wanted_accuracy_fails() -> None:
    assert statuses(BASE, evaluation(0.85), BLANK)[0] == "fail"


def test_a_base_that_was_good_already_leaves_nothing_to_show() -> None:
    assert statuses(evaluation(0.9, checkpoint="base"), evaluation(0.95), BLANK)[0] == "fail"


def test_few_answers_around_the_margin_are_inconclusive() -> None:
    base = evaluation(0.6, checkpoint="base", count=40)
    assert judge_inference(base, evaluation(0.95, count=40, seed=1), evaluation(0.2, blank=True, count=40))[
        0
    ].status == ("inconclusive")


def test_a_model_that_answers_without_looking_fails() -> None:
    assert statuses(BASE, evaluation(0.95), evaluation(0.95, blank=True))[1] == "fail"
    assert statuses(BASE, evaluation(0.95), evaluation(0.33, blank=True))[1] == "inconclusive"


@pytest.mark.parametrize(
    ("base", "tuned", "blank", "reason"),
    [
        (BASE, evaluation(0.95), evaluation(0.25), "blanked ones"),
        (evaluation(0.1), evaluation(0.95), BLANK, "same checkpoint"),
        (BASE, evaluation(0.95, checkpoint="other"), BLANK, "another checkpoint"),
        (BASE, evaluation(0.95, count=100), BLANK, "same questions"),
    ],
)
def test_evaluations_that_do_not_belong_together_are_invalid(
    base: Evaluation, tuned: Evaluation, blank: Evaluation, reason: str
) -> None:
    gates = judge_inference(base, tuned, blank)
    assert {gate.status for gate in gates} == {"invalid"}
    assert reason in gates[0].summary


def test_too_few_answers_are_invalid() -> None:
    gates = judge_inference(
        evaluation(0.1, checkpoint="base", count=8),
        evaluation(1.0, count=8),
        evaluation(0.0, blank=True, count=8),
    )
    assert gates[0].status == "invalid"
    assert "8 answers" in gates[0].summary
