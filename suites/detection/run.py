# SPDX-License-Identifier: Apache-2.0
"""The detection suite: plant every fault, grade it, grade healthy runs against each other, write the matrix.

    python -m suites.detection.run [--work FOLDER] [--output reports/detection.json] [--only AREA …]
        [--jobs N] [--max-runs N]

What is in the work folder is kept: a suite that was stopped goes on where it stopped. With --max-runs it stops by
itself after so many training runs, with exit code 75 while some are left.
"""

import argparse
import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.hardware import REPOSITORY, environment_fingerprint
from harness.policy import Policy, load_policy
from harness.report.build import build_report
from harness.report.collect import DETECTION_FILE
from harness.verdict import EXIT_CODES, Verdict
from models.contract.errors import RunError
from suites.detection.faults import FAULTS, Fault
from suites.detection.healthy import gate_counts, is_false_alarm, synthetic_pairs, trained_pairs
from suites.detection.inference_faults import answer_jobs, judge_answers
from suites.detection.judging import fresh, judge, measured_baseline
from suites.detection.training_jobs import (
    SETUPS,
    Job,
    Workshop,
    baseline_jobs,
    fault_jobs,
    has_ended,
    healthy_jobs,
    prepare,
    train,
)

logger = logging.getLogger(__name__)

RED = frozenset({"fail", "invalid"})
CONFIDENCE = 0.95
UNFINISHED_EXIT = 75
"""Of a suite that has training runs left; sysexits' EX_TEMPFAIL."""


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 when every fault was caught and no healthy pair was called bad."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    faults = [fault for fault in FAULTS if not options.only or fault.area in options.only]
    needed = {fault.setup for fault in faults} | ({"qwen3_vl", "qwen3_vl_long"} if options.seeds else set())
    setups = [setup for setup in SETUPS if setup in needed | {"qwen3_vl"}]
    shop, policy = prepare(options.work, setups), load_policy()
    groups = healthy_jobs(
        shop, num_seeds=options.seeds, num_tensor_parallel=options.tensor_parallel_seeds,
        num_long=options.long_seeds if options.seeds else 0,
    )  # fmt: skip
    if not _train_all(shop, setups, faults, groups, limit=options.max_runs, num_workers=options.jobs):
        return UNFINISHED_EXIT
    rows = _rows(shop, setups, faults, policy)
    trained = trained_pairs(groups, policy)
    synthetic = synthetic_pairs(fresh(shop.folder / "synthetic"), options.synthetic_seeds, policy)
    num_runs = sum(len(jobs) for jobs in groups.values())
    report = _report(rows, trained, synthetic, num_runs=num_runs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.output.name == DETECTION_FILE:
        logger.info("%s", build_report([options.output], options.output.parent / "detection"))
    summary = report["summary"]
    logger.info("%s", json.dumps(summary))
    return int(summary["caught"] < summary["faults"] or summary["false_alarms"] > 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="suites.detection.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "work" / "detection", help="what is there is kept"
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY / "reports" / DETECTION_FILE)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of healthy runs; 0 leaves them out")
    parser.add_argument(
        "--tensor-parallel-seeds", type=int, default=2, help="of these, so many also on two ranks"
    )
    parser.add_argument("--long-seeds", type=int, default=2, help="seeds of longer healthy runs")
    parser.add_argument(
        "--synthetic-seeds", type=int, default=25, help="seeds of made-up healthy runs, four runs each"
    )
    parser.add_argument("--only", nargs="*", default=[], help="areas")
    parser.add_argument("--jobs", type=int, default=1, help="training runs side by side")
    parser.add_argument("--max-runs", type=int, default=0, help="train at most so many runs; 0: all")
    return parser.parse_args(arguments)


def _train_all(
    shop: Workshop,
    setups: list[str],
    faults: list[Fault],
    groups: dict[str, list[Job]],
    *,
    limit: int,
    num_workers: int,
) -> bool:
    """Train what has not been trained; whether nothing is left."""
    jobs = [job for setup in setups for job in baseline_jobs(shop, setup)] + fault_jobs(shop, faults)
    jobs += [job for group in groups.values() for job in group]
    if any(fault.area == "inference" for fault in faults):
        jobs += answer_jobs(shop)
    waiting = [job for job in jobs if not has_ended(job)]
    now = waiting[:limit] if limit else waiting
    logger.info("%d training runs, %d to do, %d now", len(jobs), len(waiting), len(now))
    train(now, shop, num_workers=num_workers)
    return len(now) == len(waiting)


def _rows(shop: Workshop, setups: list[str], faults: list[Fault], policy: Policy) -> list[dict[str, Any]]:
    """One row of the matrix a fault. Raises RunError when what faults are compared with is not sound itself."""
    baselines = {setup: measured_baseline(shop, setup, policy) for setup in setups}
    if any(fault.area == "inference" for fault in faults):
        sound = judge_answers(None, shop)
        if sound.name != "PASS":
            raise RunError(
                "the sound fine-tune does not pass", got="; ".join(gate.summary for gate in sound.gates)
            )
    rows = []
    for fault in faults:
        rows.append(_row(fault, judge(fault, shop, baselines, policy)))
        word = "caught" if rows[-1]["caught"] else "MISSED"
        logger.info("%-11s %-22s %-8s %s", fault.area, fault.name, word, rows[-1]["verdict"])
    return rows


def _row(fault: Fault, verdict: Verdict) -> dict[str, Any]:
    red = {gate.gate: gate.status for gate in verdict.gates if gate.blocks and gate.status in RED}
    is_caught = EXIT_CODES[verdict.name] != 0 and bool(fault.gates & red.keys())
    first = next((gate.summary for gate in verdict.gates if gate.gate in red), "; ".join(verdict.notes))
    return {
        "name": fault.name,
        "area": fault.area,
        "what": fault.what,
        "setup": fault.setup,
        "expected_gates": sorted(fault.gates),
        "caught": is_caught,
        "verdict": verdict.name,
        "gates": {gate.gate: gate.status for gate in verdict.gates},
        "red_gates": sorted(red),
        "summary": first[:300],
    }


def _report(
    rows: list[dict[str, Any]],
    trained: list[dict[str, Any]],
    synthetic: list[dict[str, Any]],
    *,
    num_runs: int,
) -> dict[str, Any]:
    caught = sum(row["caught"] for row in rows)
    healthy = {"trained": trained, "synthetic": synthetic}
    alarms = {kind: sum(map(is_false_alarm, pairs)) for kind, pairs in healthy.items()}
    return {
        "schema_version": 2,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {
            "faults": len(rows),
            "caught": caught,
            "healthy_pairs": len(trained),
            "false_alarms": alarms["trained"],
            "healthy_runs": num_runs,
            "synthetic_pairs": len(synthetic),
            "synthetic_false_alarms": alarms["synthetic"],
        },
        "detection": _share(caught, len(rows)),
        "false_alarm": {kind: _share(alarms[kind], len(pairs)) for kind, pairs in healthy.items()},
        "healthy_gates": {kind: gate_counts(pairs) for kind, pairs in healthy.items()},
        "confidence": CONFIDENCE,
        "note": (
            f"healthy_pairs are ordered pairs of {num_runs} real training runs, so they are not independent; "
            "synthetic pairs are made-up curves and are counted apart. Intervals are Clopper and Pearson's."
        ),
        "gates": sorted({gate for row in rows for gate in row["gates"]}),
        "matrix": rows,
        "pairs": [*trained, *synthetic],
        "fault_table": [{**asdict(fault), "gates": sorted(fault.gates)} for fault in FAULTS],
        "environment": environment_fingerprint(),
    }


def _share(count: int, total: int) -> dict[str, Any]:
    from statsmodels.stats.proportion import proportion_confint

    interval: Any = (0.0, 1.0)
    if total:
        interval = proportion_confint(count, total, alpha=1 - CONFIDENCE, method="beta")
    low, high = (float(bound) for bound in interval)
    return {"count": count, "total": total, "rate": count / total if total else None, "interval": [low, high]}


if __name__ == "__main__":
    raise SystemExit(main())
