# SPDX-License-Identifier: Apache-2.0
"""A few iterations of a cut-down model: does the whole path work on this machine? Nothing is compared."""

from collections.abc import Callable

from harness.session import CaseResult


def test_run_is_sound(sound_run: CaseResult, settle: Callable[[CaseResult], None]) -> None:
    settle(sound_run)


def test_loss_goes_down(sound_run: CaseResult) -> None:
    assert sound_run.graded is not None
    loss = sound_run.graded.record.values("lm_loss")
    third = max(1, len(loss) // 3)
    first, last = float(loss[:third].mean()), float(loss[-third:].mean())
    assert last < first, f"mean loss of the first third {first:.4f}, of the last {last:.4f}"
