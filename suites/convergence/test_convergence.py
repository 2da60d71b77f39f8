# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes end where their baseline ends: the loss of the last 50 iterations is equivalent within 5%."""

from collections.abc import Callable

from harness.cases import Case
from harness.session import CaseResult


def select_case(case: Case) -> bool:
    """Controls are compared with their partner (test_control.py), not with a baseline."""
    return not case.recipe.data.blank_images


def test_loss_matches_baseline(case_result: CaseResult, settle: Callable[[CaseResult], None]) -> None:
    settle(case_result)
