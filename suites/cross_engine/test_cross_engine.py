# SPDX-License-Identifier: Apache-2.0
"""Two engines that share no model code train alike: same recipe, data and weights on Megatron and on FSDP2.

The case is the FSDP2 run; its partner is the recipe beside it that differs in `train.engine` alone. The recipes are
calm: from weights moved by one float, two runs of one engine end as near to each other as the two engines do
(`python -m benchmarks.rounding RECIPE`).
"""

from collections.abc import Callable

from harness.cases import Case, cases_of_folder
from harness.partner import judge_against, partner_of, step_gaps
from harness.session import CaseResult, SessionOptions

NUM_PAIRED = 20
FIRST_LOSS_GAP = {"fp32": 5e-7, "bf16": 2e-3}
"""Largest relative gap of the first loss. fp32, measured worst over the four tiny families: 3e-8."""
PAIRED_GAP = {"fp32": 5e-6, "bf16": 2e-2}
"""Largest relative gap over the first twenty losses; rounding grows from step to step. fp32, measured worst over the
four tiny families: 2e-7; of nine planted differences (tests/suites/test_cross_engine.py) the smallest, ten times the
weight decay, reaches 4e-5."""

Results = Callable[[Case], list[CaseResult]]


def select_case(case: Case) -> bool:
    return case.recipe.train.engine == "fsdp2"


def partner_result(case: Case, results_of: Results) -> CaseResult:
    """The Megatron run of the same recipe."""
    partner = partner_of(case, cases_of_folder(case.recipe_file.parent), "train", engine="megatron")
    return results_of(partner)[0]


def test_first_losses_are_equal(case: Case, sound_run: CaseResult, results_of: Results) -> None:
    partner = partner_result(case, results_of)
    assert sound_run.graded is not None
    assert partner.graded is not None
    gaps = step_gaps(sound_run.graded.record, partner.graded.record)[:NUM_PAIRED]
    dtype = case.recipe.precision.dtype
    assert gaps[0] <= FIRST_LOSS_GAP[dtype], f"first loss {gaps[0]:.1e} apart"
    assert gaps.max() <= PAIRED_GAP[dtype], f"step {gaps.argmax() + 1} is {gaps.max():.1e} apart"


def test_curves_are_equivalent(
    case: Case, sound_run: CaseResult, results_of: Results, session_options: SessionOptions
) -> None:
    graded = judge_against(sound_run, partner_result(case, results_of), session_options)
    problems = [f"{gate.gate} {gate.status}: {gate.summary}" for gate in graded.verdict.gates if gate.blocks]
    assert graded.verdict.name == "PASS", "\n".join(problems)
