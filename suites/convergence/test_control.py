# SPDX-License-Identifier: Apache-2.0
"""The loss depends on what is in the images: with their content blanked it ends clearly higher.

A control is a recipe that differs from another of this suite in ``data.blank_images`` alone.
"""

from collections.abc import Callable

from harness.cases import Case, cases_of_folder
from harness.report.numbers import CONTROL_RATIO, end_loss
from harness.session import CaseResult


def select_case(case: Case) -> bool:
    return case.recipe.data.blank_images


def partner_of(control: Case) -> Case:
    """The case with the same recipe and its images left as they are."""
    wanted = control.recipe.model_dump(exclude={"name", "description", "notes", "hardware", "checkpoint"})
    wanted["data"]["blank_images"] = False
    for case in cases_of_folder(control.recipe_file.parent):
        recipe = case.recipe.model_dump(exclude={"name", "description", "notes", "hardware", "checkpoint"})
        if case.hardware == control.hardware and recipe == wanted:
            return case
    raise AssertionError(f"{control.id} differs from every other recipe in more than blank_images")


def test_blanked_images_cost_loss(
    case: Case, sound_run: CaseResult, results_of: Callable[[Case], list[CaseResult]]
) -> None:
    seen = results_of(partner_of(case))[0]
    assert sound_run.graded is not None
    assert seen.graded is not None
    with_images, blanked = end_loss(seen.graded.record.series), end_loss(sound_run.graded.record.series)
    assert blanked > CONTROL_RATIO * with_images, f"blanked {blanked:.4f}, with images {with_images:.4f}"
