# SPDX-License-Identifier: Apache-2.0
"""A shorter number format trains alike: bf16 against fp32 on a CPU, fp8 against bf16 on a GPU.

The case is the shorter one; its partner is the recipe beside it that differs in `precision` alone. What decides is
where they end: over the first steps the formats differ by their rounding, which the report shows.
"""

from collections.abc import Callable

from harness.cases import Case, cases_of_folder
from harness.partner import judge_against, partner_of
from harness.session import CaseResult, SessionOptions

DECIDING = frozenset({"C3", "C6"})
"""End window and held-out loss."""


def select_case(case: Case) -> bool:
    return is_shorter(case)


def is_shorter(case: Case) -> bool:
    """Whether the case is the one to be compared, not the one it is compared with."""
    precision = case.recipe.precision
    return precision.fp8 is not None or (case.hardware == "cpu" and precision.dtype != "fp32")


def longer_partner(case: Case, known: list[Case]) -> Case:
    """The case in the longer format."""
    dtype = "fp32" if case.recipe.precision.fp8 is None else case.recipe.precision.dtype
    return partner_of(case, known, "precision", dtype=dtype, fp8=None)


def test_curves_end_alike(
    case: Case,
    sound_run: CaseResult,
    results_of: Callable[[Case], list[CaseResult]],
    session_options: SessionOptions,
) -> None:
    partner = longer_partner(case, cases_of_folder(case.recipe_file.parent))
    graded = judge_against(sound_run, results_of(partner)[0], session_options, deciding=DECIDING)
    problems = [f"{gate.gate} {gate.status}: {gate.summary}" for gate in graded.verdict.gates if gate.blocks]
    assert graded.verdict.name == "PASS", "\n".join(problems)
