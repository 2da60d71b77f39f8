# SPDX-License-Identifier: Apache-2.0
"""The same work a device goes on many devices as fast as on one, but for a share that the policy allows.

A scaled case is a recipe that differs from one of this suite for one device in nothing but how many share the work.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from harness.cases import Case, cases_of_folder
from harness.policy import load_policy
from harness.scaling import scaling_key, scalings
from harness.session import CaseResult

UNSOUND = {"INVALID", "INFRA_ERROR", "ENV_MISMATCH"}


@functools.cache
def cases_on_one_device(folder: Path) -> dict[tuple[str, str], Case]:
    """Cases for one device, by what they have in common with scaled ones, and by hardware."""
    return {
        (scaling_key(case.recipe), case.hardware): case
        for case in cases_of_folder(folder)
        if case.recipe.num_processes == 1
    }


def alone(scaled: Case) -> Case | None:
    found = cases_on_one_device(scaled.recipe_file.parent)
    return found.get((scaling_key(scaled.recipe), scaled.hardware))


def select_case(case: Case) -> bool:
    return case.recipe.num_processes > 1 and alone(case) is not None


def test_more_devices_do_as_much_each(
    case: Case, sound_run: CaseResult, results_of: Callable[[Case], list[CaseResult]]
) -> None:
    partner = alone(case)
    assert partner is not None
    results = [*results_of(partner), sound_run]
    unsound = [f"{item.case.id}: {item.verdict.name}" for item in results if item.verdict.name in UNSOUND]
    assert not unsound, f"nothing to compare: {', '.join(unsound)}"
    found = scalings(item.graded.record for item in results if item.graded is not None)
    assert len(found) == 1, (
        f"not comparable: {[(item.names, item.hardware, item.device_name) for item in found]}"
    )
    faults = found[0].faults(load_policy().throughput.scaling_floor)
    assert not faults, "; ".join(faults)
