# SPDX-License-Identifier: Apache-2.0
"""The main job on a machine without GPU, in minutes: ``python -m harness.smoke`` (what ``make smoke`` runs).

Tiny checkpoints and drawn scenes are made; checkpoints are converted there and back; both dense families are fine-tuned
for 500 iterations, beside a control whose images are blank and a run on real photographs; everything is judged against
``baselines/cpu`` and shown in one report. Two trainings run side by side, one thread each.
"""

import argparse
import json
import logging
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from harness.assets import ensure, run_program, tiny_checkpoint_name
from harness.cases import SUITES, Case, cases_of_folder
from harness.launch import Watch
from harness.report.build import build_report
from harness.report.ci import announce
from harness.report.collect import SAMPLES_FILE
from harness.report.view import decided_by
from harness.round_trip import round_trip
from harness.session import REPORTS, CaseResult, SessionOptions, new_run_root, run_case
from harness.verdict import EXIT_CODES, worst
from models.contract.errors import HarnessError
from models.contract.site import load_site

logger = logging.getLogger("smoke")

PHOTOGRAPHS = "tiny_qwen3_vl_photos"
CASES = ("tiny_qwen3_vl", "tiny_qwen2_5_vl", "tiny_qwen3_vl_blank", PHOTOGRAPHS)
CONVERTED = ("qwen3_vl", "qwen2_5_vl")
JOBS = 2
TIME_BUDGET_S = 300.0
NUM_SHOWN = 8


def smoke(options: SessionOptions, report_dir: Path) -> int:
    """Run everything and build the report; returns the exit code of the worst verdict.

    Raises:
        HarnessError: an input could not be made, or a conversion is not exact.
    """
    cases = select_cases()
    ensure(cases, options.site)
    cancel = Event()
    watch = Watch(time_budget_s=options.time_budget_s, cancel=cancel)
    with ThreadPoolExecutor(max_workers=JOBS) as pool:
        runs = [pool.submit(run_case, case, options, watch=watch) for case in cases]
        conversions = [pool.submit(convert, family, options) for family in CONVERTED]
        try:
            results = [_finished(run) for run in runs]
            for conversion in conversions:
                conversion.result()
        except BaseException:
            cancel.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for result in results:
        if result.case.name == PHOTOGRAPHS and result.launched and result.launched.completed:
            caption_photographs(result, options)
    report = build_report([options.run_root], report_dir)
    announce(report_dir, [(result.case.id, result.verdict) for result in results])
    logger.info("report: %s", report)
    return EXIT_CODES[worst(result.verdict.name for result in results)]


def select_cases() -> list[Case]:
    """The CPU cases of the smoke run, longest first."""
    known = {case.name: case for case in cases_of_folder(SUITES / "convergence") if case.hardware == "cpu"}
    return [known[name] for name in CASES]


def convert(family: str, options: SessionOptions) -> None:
    """Convert a family's tiny checkpoint there and back; the comparison goes into the report."""
    source = options.site.checkpoint(tiny_checkpoint_name(family))
    artifacts = options.run_root / "conversion" / family
    data = round_trip(source, artifacts / "work", artifacts, name=f"tiny {family}")
    logger.info("%-14s%s: %d tensors bit-exact", "EQUAL", f"conversion/{family}", data["num_equal"])


def caption_photographs(result: CaseResult, options: SessionOptions) -> None:
    """Let the tuned checkpoint describe some of the photographs it saw, for the report."""
    raw = options.site.dataset(result.case.recipe.data.dataset + ".raw")
    entries = json.loads(next(raw.glob("*.json")).read_text(encoding="utf-8"))
    shown = list({entry["image"]: entry for entry in entries}.values())[:NUM_SHOWN]
    folder = result.run_dir / "captions"
    folder.mkdir()
    requests, answers = folder / "requests.jsonl", folder / "answers.jsonl"
    asked = [{"prompt": _said(entry, "human"), "images": [str(raw / entry["image"])]} for entry in shown]
    requests.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    ask = ["models.entry.generate", "answer", "--checkpoint", str(result.run_dir), "--requests", str(requests)]
    run_program([*ask, "--max-new-tokens", "64", "--out", str(answers), *_pixel_limits(result.case)])
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    samples = [
        {
            "image": str(raw / entry["image"]),
            "prompt": _said(entry, "human").replace("<image>", "").strip(),
            "text": row["answer"],
            "reference": _said(entry, "gpt"),
        }
        for entry, row in zip(shown, rows, strict=True)
    ]
    (folder / SAMPLES_FILE).write_text(
        json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _said(entry: dict[str, Any], who: str) -> str:
    return next(turn["value"] for turn in entry["conversations"] if turn["from"] == who)


def _pixel_limits(case: Case) -> list[str]:
    """The limits the recipe trained with."""
    data = case.recipe.data
    limits = {"--min-pixels": data.min_pixels, "--max-pixels": data.max_pixels}
    return [part for option, value in limits.items() if value is not None for part in (option, str(value))]


def _finished(run: "Future[CaseResult]") -> CaseResult:
    result = run.result()
    text = decided_by(result.verdict.gates) or "; ".join(result.verdict.notes)
    logger.info("%-14s%s: %s", result.verdict.name, result.case.id, text)
    return result


def main() -> int:
    """Parse the two folders and run."""
    parser = argparse.ArgumentParser(prog="harness.smoke", description=__doc__)
    parser.add_argument("--run-root", type=Path, help="folder of the runs (default: runs/<time>)")
    parser.add_argument("--report-dir", type=Path, default=REPORTS / "smoke", help="folder of the report")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    start = time.monotonic()
    try:
        options = SessionOptions(
            run_root=(arguments.run_root or new_run_root()).absolute(),
            site=load_site(),
            time_budget_s=TIME_BUDGET_S,
            num_threads=1,
        )
        code = smoke(options, arguments.report_dir)
    except HarnessError as error:
        logger.error("%s", "\n".join([str(error), *getattr(error, "__notes__", [])]))
        return 3
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    logger.info("%.0f s, exit code %d", time.monotonic() - start, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
