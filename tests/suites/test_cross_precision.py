# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from harness.cases import SUITES, cases_of_folder
from harness.partner import judge_against
from harness.session import SessionOptions
from suites.cross_precision.test_cross_precision import DECIDING, is_shorter, longer_partner
from tests.harness.test_partner import result_of

CASES = cases_of_folder(SUITES / "cross_precision")


def test_every_shorter_format_has_a_longer_one_beside_it() -> None:
    pairs = {
        (case.hardware, case.name): longer_partner(case, CASES).name for case in CASES if is_shorter(case)
    }
    assert pairs[("cpu", "tiny_qwen3_vl_bf16")] == "tiny_qwen3_vl"
    for hardware in ("h20", "h100", "h200"):
        for scaling in ("tensorwise", "blockwise"):
            assert pairs[(hardware, f"qwen3_vl_2b_colours_fp8_{scaling}")] == "qwen3_vl_2b_colours"
    assert len({case.recipe.sha() for case in CASES}) == len({case.name for case in CASES})


def test_rounding_of_the_first_steps_does_not_decide_and_the_end_does(tmp_path: Path) -> None:
    options = SessionOptions(run_root=tmp_path)
    reference = result_of(tmp_path / "a")
    shifted = result_of(
        tmp_path / "b", factor=1.01
    )  # beyond the margins of the first loss and the first steps
    assert judge_against(shifted, reference, options).verdict.name == "REGRESSION"
    assert judge_against(shifted, reference, options, deciding=DECIDING).verdict.name == "PASS"
    worse = result_of(tmp_path / "c", factor=1.08)
    assert judge_against(worse, reference, options, deciding=DECIDING).verdict.name == "REGRESSION"
