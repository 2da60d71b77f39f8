# SPDX-License-Identifier: Apache-2.0
"""Gate on what was learnt: fine-tuning must make held-out answers right, and blanking the pictures must undo it.

Two gates from three evaluations of the same held-out items (base model, fine-tuned model, fine-tuned model with
blanked media). Improvement is a paired difference of exact-answer accuracy; its interval is the normal one for the mean
of paired differences in {-1, 0, 1}. Blanked accuracy is compared with chance, with a Wilson interval.
"""

from typing import Any

import numpy as np
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from harness.verdict import GateResult
from models.contract.evaluation import Evaluation, EvaluationItem, score_items

MIN_ANSWERS = 30
CONFIDENCE = 0.95


def judge_inference(
    base: Evaluation,
    tuned: Evaluation,
    blanked: Evaluation,
    *,
    min_improvement: float = 0.30,
    min_accuracy: float = 0.90,
    blank_slack: float = 0.05,
) -> tuple[GateResult, GateResult]:
    """Judge a fine-tuned model by what it answers.

    Args:
        base: The model before fine-tuning.
        tuned: The model after it.
        blanked: The model after it, shown media without content.
        min_improvement: Accuracy that must be gained over `base`, as a fraction.
        min_accuracy: Accuracy that must be reached by `tuned`.
        blank_slack: How far above chance `blanked` may lie.

    Returns: The gates `inference_improvement` and `inference_blank`; `details["unit"]` is "accuracy".
    """
    problem = _problem(base, tuned, blanked)
    if problem:
        return _invalid("inference_improvement", problem), _invalid("inference_blank", problem)
    return (
        _improvement(base, tuned, min_improvement=min_improvement, min_accuracy=min_accuracy),
        _blank(blanked, slack=blank_slack),
    )


def _improvement(
    base: Evaluation, tuned: Evaluation, *, min_improvement: float, min_accuracy: float
) -> GateResult:
    before, after = (np.array([item.is_exact for item in _answers(part)], float) for part in (base, tuned))
    effect = float((after - before).mean())
    low, high = _mean_interval(after - before)
    reached = float(after.mean())
    if low >= min_improvement and reached >= min_accuracy:
        status = "pass"
    elif high < min_improvement or reached < min_accuracy:
        status = "fail"
    else:
        status = "inconclusive"
    return GateResult(
        gate="inference_improvement",
        status=status,
        blocks=True,
        summary=f"answers right {before.mean():.1%} -> {reached:.1%}: gained {effect:+.1%} "
        f"[{low:+.1%}, {high:+.1%}] over {len(after)} answers; wanted {min_improvement:+.0%} and at least "
        f"{min_accuracy:.0%}",
        effect=effect,
        interval=(low, high),
        margin=(min_improvement, 1.0),
        details={"unit": "accuracy", "min_accuracy": min_accuracy, **_scores(base=base, tuned=tuned)},
    )


def _blank(blanked: Evaluation, *, slack: float) -> GateResult:
    scores = score_items(blanked.items)
    assert scores.accuracy is not None
    assert scores.chance_accuracy is not None
    right = round(scores.accuracy * scores.num_answers)
    interval: Any = proportion_confint(right, scores.num_answers, alpha=1 - CONFIDENCE, method="wilson")
    low, high = float(interval[0]), float(interval[1])
    limit = scores.chance_accuracy + slack
    status = "pass" if scores.accuracy <= limit else ("fail" if low > limit else "inconclusive")
    return GateResult(
        gate="inference_blank",
        status=status,
        blocks=True,
        summary=f"answers right with blanked media {scores.accuracy:.1%} [{low:.1%}, {high:.1%}]; chance "
        f"{scores.chance_accuracy:.1%}, allowed {limit:.1%}",
        effect=scores.accuracy - scores.chance_accuracy,
        interval=(low - scores.chance_accuracy, high - scores.chance_accuracy),
        margin=(-1.0, slack),
        details={"unit": "accuracy", **_scores(blanked=blanked)},
    )


def _mean_interval(differences: np.ndarray) -> tuple[float, float]:
    """Interval of the mean; a constant series (everything learnt at once) has no spread to speak of."""
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    interval: Any = DescrStatsW(differences).zconfint_mean(alpha=1 - CONFIDENCE)
    low, high = interval
    return float(low), float(high)


def _problem(base: Evaluation, tuned: Evaluation, blanked: Evaluation) -> str:
    """Why these three cannot be compared, or an empty string."""
    if base.blank_images or tuned.blank_images or not blanked.blank_images:
        return "expected base and tuned with pictures and the third evaluation with blanked ones"
    if base.checkpoint_fingerprint == tuned.checkpoint_fingerprint:
        return "base and tuned are the same checkpoint"
    if tuned.checkpoint_fingerprint != blanked.checkpoint_fingerprint:
        return "the blanked evaluation is of another checkpoint than the tuned one"
    asked = [
        [(item.key, item.question, item.truth) for item in part.items] for part in (base, tuned, blanked)
    ]
    if asked[0] != asked[1] or asked[1] != asked[2]:
        return "the three evaluations did not ask the same questions"
    count = len(_answers(tuned))
    return "" if count >= MIN_ANSWERS else f"{count} answers to judge by, at least {MIN_ANSWERS} are needed"


def _answers(evaluation: Evaluation) -> list[EvaluationItem]:
    return [item for item in evaluation.items if item.media and item.kind == "answer"]


def _scores(**evaluations: Evaluation) -> dict[str, Any]:
    return {name: score_items(part.items).model_dump() for name, part in evaluations.items()}


def _invalid(gate: str, problem: str) -> GateResult:
    return GateResult(gate=gate, status="invalid", blocks=True, summary=problem)
