# SPDX-License-Identifier: Apache-2.0
"""Step time is what the baseline says it is, at fixed shapes."""

from collections.abc import Callable

from harness.session import CaseResult


def test_step_time_matches_baseline(case_result: CaseResult, settle: Callable[[CaseResult], None]) -> None:
    settle(case_result)
