# SPDX-License-Identifier: Apache-2.0
"""The main job on a machine without GPU, in minutes: ``qwen-harness smoke`` (what ``make smoke`` runs).

Tiny checkpoints and drawn scenes are made; checkpoints are converted there and back; both dense families are fine-tuned
for 500 iterations, beside a control whose images are blank and a run on real photographs; everything is judged against
``baselines/cpu`` and shown in one report. Two trainings run side by side, one thread each.
"""

import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from harness.assets import ensure, run_program, tiny_checkpoint_name
from harness.cases import SUITES, Case, discover
from harness.launch import Watch
from harness.report.build import build_report
from harness.report.ci import announce
from harness.report.collect import SAMPLES_FILE
from harness.report.view import decided_by
from harness.round_trip import round_trip
from harness.session import CaseResult, SessionOptions, run_case
from harness.verdict import EXIT_CODES, worst

logger = logging.getLogger("smoke")

PHOTOGRAPHS = "debug/tiny_qwen3_vl_photos@cpu"
COMPARED = ("convergence/tiny_qwen3_vl@cpu", "convergence/tiny_qwen2_5_vl@cpu")
"""Fine-tunes that have a baseline; the control has a partner, the photographs are looked at."""
CASES = (*COMPARED, "convergence/tiny_qwen3_vl_blank@cpu", PHOTOGRAPHS)
CONVERTED = ("qwen3_vl", "qwen2_5_vl")
JOBS = 2
TIME_BUDGET_S = 600.0
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
        runs = [
            pool.submit(run_case, case, options, watch=watch, use_baseline=case.id in COMPARED)
            for case in cases
        ]
        conversions = [pool.submit(convert, family, options) for family in CONVERTED]
        try:
            results = [_finished(run) for run in runs]
            for conversion in conversions:
                conversion.result()
        except BaseException:
            cancel.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    trained = [result for result in results if result.launched and result.launched.completed]
    try:
        for result in trained:
            if result.case.id == PHOTOGRAPHS:
                caption_photographs(result, options)
    finally:  # what was trained is shown even if it cannot speak
        logger.info("report: %s", build_report([options.run_root], report_dir))
    announce(report_dir, [(result.case.id, result.verdict) for result in results])
    return EXIT_CODES[worst(result.verdict.name for result in results)]


def select_cases() -> list[Case]:
    """The cases of the smoke run, longest first."""
    known = {case.id: case for case in discover(SUITES)}
    return [known[case_id] for case_id in CASES]


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
    ask = [
        "models.entry.generate",
        "answer",
        "--checkpoint",
        str(result.run_dir),
        "--requests",
        str(requests),
    ]
    site = ["--site", str(options.site_file)] if options.site_file else []
    run_program([*ask, "--max-new-tokens", "64", "--out", str(answers), *_pixel_limits(result.case), *site])
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
