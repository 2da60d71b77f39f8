# SPDX-License-Identifier: Apache-2.0
"""Held-out answers of a fine-tune, for the inference gates: sound ones, and as a wrong program would have left them.

The fine-tune is the shipped convergence case of `tiny_qwen3_vl`, so what is judged here is what a smoke run judges.
"""

from collections.abc import Callable

from harness.cases import SUITES
from harness.gates.inference import judge_inference
from harness.verdict import Verdict, verdict_of_gates
from models.contract.evaluation import Evaluation, read_evaluation
from models.contract.recipe import load_recipe
from suites.detection.faults import Fault
from suites.detection.training_jobs import Job, Workshop, make_dataset, run_module, train

RECIPE = SUITES / "convergence" / "tiny_qwen3_vl.toml"
HEALTHY, BLIND = "answers-healthy", "taught_blind"
Answers = tuple[Evaluation, Evaluation, Evaluation]
"""Of the base model, of the fine-tuned one, and of that one with blank pictures."""


def answer_jobs(shop: Workshop) -> list[Job]:
    """One sound fine-tune and one that sees nothing."""
    make_dataset(shop, load_recipe(RECIPE).data.dataset)
    faults = {HEALTHY: None, BLIND: BLIND}
    return [
        Job(name=name, recipe=RECIPE, run_dir=shop.run_dir(name), site=shop.site, fault=fault)
        for name, fault in faults.items()
    ]


def judge_answers(fault: Fault | None, shop: Workshop) -> Verdict:
    """The verdict on the answers of a fault; on the sound ones without."""
    train(answer_jobs(shop), shop)
    if fault is not None and fault.name == BLIND:
        answers = _answers(shop, BLIND)
    else:
        answers = _answers(shop, HEALTHY)
    if fault is not None and fault.name != BLIND:
        answers = ANSWER_FAULTS[fault.name](*answers)
    gates = judge_inference(*answers)
    return Verdict(name=verdict_of_gates(gates), gates=gates)


def _answers(shop: Workshop, name: str) -> Answers:
    recipe = load_recipe(RECIPE)
    tuned = shop.run_dir(name)
    base = shop.checkpoint(recipe.model.checkpoint)
    asked = {
        "base": ["--checkpoint", str(base)],
        f"{name}-tuned": ["--checkpoint", str(tuned)],
        f"{name}-blank": ["--checkpoint", str(tuned), "--blank-images"],
    }
    folder, found = shop.folder / "answers", []
    folder.mkdir(exist_ok=True)
    for part, options in asked.items():
        file = folder / f"{part}.json"
        if not file.exists():
            common = ["--dataset", recipe.data.dataset, "--site", str(shop.site), "--out", str(file)]
            run_module(["models.entry.generate", "evaluate", *options, *common])
        found.append(read_evaluation(file))
    return found[0], found[1], found[2]


def _base_for_tuned(base: Evaluation, tuned: Evaluation, blank: Evaluation) -> Answers:
    return base, tuned.model_copy(update={"items": base.items}), blank


def _known_before(base: Evaluation, tuned: Evaluation, blank: Evaluation) -> Answers:
    return base.model_copy(update={"items": tuned.items}), tuned, blank


def _pictures_left_in(base: Evaluation, tuned: Evaluation, blank: Evaluation) -> Answers:
    return base, tuned, blank.model_copy(update={"items": tuned.items})


ANSWER_FAULTS: dict[str, Callable[[Evaluation, Evaluation, Evaluation], Answers]] = {
    "base_for_tuned": _base_for_tuned,
    "known_before": _known_before,
    "pictures_left_in": _pictures_left_in,
}
