# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes end where their baseline ends: the loss of the last 50 iterations is equivalent within 5%."""

from collections.abc import Callable

from harness.session import CaseResult


def test_loss_matches_baseline(case_result: CaseResult, settle: Callable[[CaseResult], None]) -> None:
    settle(case_result)
