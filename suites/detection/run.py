# SPDX-License-Identifier: Apache-2.0
"""The detection suite: plant every fault, grade it, grade healthy runs against each other, write the matrix.

python -m suites.detection.run [--work FOLDER] [--output reports/detection.json] [--seeds 14] [--only AREA …]
"""

import argparse
import itertools
import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.baselines import Baseline, BaselineKey, baseline_of_records, find_for_case
from harness.baselines.store import baseline_path, write_baseline
from harness.grading import compare, grade
from harness.hardware import REPOSITORY, environment_fingerprint
from harness.policy import Policy, load_policy
from harness.records import load_record
from harness.verdict import EXIT_CODES, GateResult, Verdict
from models.contract.errors import BaselineError, RunError
from models.contract.record import RUN_FILE
from suites.detection.faults import FAULTS, Fault
from suites.detection.record_faults import copy_record, write_faulty_baseline, write_faulty_record
from suites.detection.training_jobs import (
    SETUPS,
    Job,
    Workshop,
    baseline_jobs,
    fault_jobs,
    healthy_jobs,
    prepare,
    train,
)

logger = logging.getLogger(__name__)

SUITE, CASE = "detection", "tiny"
TRAINED_AREAS = frozenset({"model", "conversion", "data", "training"})
RED = frozenset({"fail", "invalid"})
CONFIDENCE = 0.95


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 when every fault was caught and no healthy pair was called bad."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    faults = [fault for fault in FAULTS if not options.only or fault.area in options.only]
    setups = sorted({fault.setup for fault in faults} | {"qwen3_vl"}, key=list(SETUPS).index)
    shop, policy = prepare(options.work, setups), load_policy()
    baselines = {setup: _baseline(shop, setup, policy) for setup in setups}
    rows: list[dict[str, Any]] = []
    for setup in setups:
        train([job for job in fault_jobs(shop, setup) if _is_wanted(job, faults)], shop)
    for fault in faults:
        rows.append(_row(fault, _judge(fault, shop, baselines[fault.setup], policy)))
        logger.info("%-11s %-22s %-8s %s", fault.area, fault.name, _word(rows[-1]), rows[-1]["verdict"])
    pairs = (
        _healthy_pairs(shop, policy, options.seeds, options.tensor_parallel_seeds) if options.seeds else []
    )
    report = _report(rows, pairs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    logger.info("%s", json.dumps(report["summary"]))
    summary = report["summary"]
    return int(summary["caught"] < summary["faults"] or summary["false_alarms"] > 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="suites.detection.run", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "work" / "detection", help="what is there is kept"
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY / "reports" / "detection.json")
    parser.add_argument("--seeds", type=int, default=14, help="seeds of healthy runs; 0 leaves them out")
    parser.add_argument(
        "--tensor-parallel-seeds", type=int, default=5, help="of these, so many also on two ranks"
    )
    parser.add_argument("--only", nargs="*", default=[], help="areas")
    return parser.parse_args(arguments)


def _is_wanted(job: Job, faults: list[Fault]) -> bool:
    return any(fault.name == job.name for fault in faults)


def _baseline(shop: Workshop, setup: str, policy: Policy) -> Baseline:
    """Of healthy launches, on disk as every baseline is. Raises RunError when a launch is not sound."""
    jobs = baseline_jobs(shop, setup)
    train(jobs, shop)
    records = [load_record(job.run_dir) for job in jobs]
    for record in records:
        verdict = grade(record, None, policy)
        if verdict.name != "NO_BASELINE" or record.info is None:
            raise RunError("a healthy launch is not sound", where=record.source, got=verdict.gates[0].summary)
    assert records[0].info is not None
    key = BaselineKey(
        suite=SUITE, case=f"{CASE}_{setup}", recipe_sha=records[0].info.recipe_sha, hardware="cpu"
    )
    baseline = baseline_of_records(records, key=key, policy=policy, created_at=records[0].info.started_at)
    path = baseline_path(shop.folder / "baselines", key)
    path.unlink(missing_ok=True)
    write_baseline(baseline, path)
    return baseline


def _judge(fault: Fault, shop: Workshop, baseline: Baseline, policy: Policy) -> Verdict:
    """Grade one fault as a user's run would be graded."""
    healthy = shop.run_dir(f"{fault.setup}-healthy-1")
    if fault.area in TRAINED_AREAS:
        return grade(load_record(shop.run_dir(f"fault-{fault.name}")), baseline, policy, hardware="cpu")
    folder = _fresh(shop.folder / "records" / fault.name)
    if fault.area == "measurement":
        hardware = "h200" if fault.name == "sparse_peak" else "cpu"
        record = load_record(write_faulty_record(healthy, folder, fault.name))
        return grade(record, None if hardware != "cpu" else baseline, policy, hardware=hardware)
    record = load_record(copy_record(healthy, folder))
    if fault.name == "other_hardware":
        return grade(record, baseline, policy, hardware="h100")
    directory = folder / "baselines"
    source = baseline_path(shop.folder / "baselines", baseline.key)
    write_faulty_baseline(source, baseline_path(directory, baseline.key), fault.name)
    try:
        match = find_for_case(directory, suite=SUITE, case=baseline.key.case, hardware="cpu", record=record)
    except BaselineError as error:
        text = f"{error.what} {error.got}"
        gate = GateResult(gate="baseline", status="invalid", blocks=True, summary=text)
        return Verdict(name="INVALID", gates=(gate,))
    verdict = grade(
        record, match.baseline, policy, hardware="cpu", match_level=match.level, notes=match.notes
    )
    if verdict.name != "NO_BASELINE":
        return verdict
    gate = GateResult(gate="baseline", status="fail", blocks=True, summary="; ".join(match.notes))
    return Verdict(name="NO_BASELINE", gates=(*verdict.gates, gate), notes=match.notes)


def _fresh(folder: Path) -> Path:
    """A folder name that is not taken."""
    return next(path for number in itertools.count() if not (path := folder / str(number)).exists())


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


def _word(row: dict[str, Any]) -> str:
    return "caught" if row["caught"] else "MISSED"


def _healthy_pairs(
    shop: Workshop, policy: Policy, num_seeds: int, num_tensor_parallel: int
) -> list[dict[str, Any]]:
    """Every ordered pair of healthy runs of one seed, one graded against the other."""
    pairs: list[dict[str, Any]] = []
    for seed, jobs in healthy_jobs(
        shop, num_seeds=num_seeds, num_tensor_parallel=num_tensor_parallel
    ).items():
        train(jobs, shop)
        records = {job.name: load_record(job.run_dir) for job in jobs if (job.run_dir / RUN_FILE).exists()}
        for (name, record), (other, reference) in itertools.permutations(records.items(), 2):
            verdict = compare(record, reference, policy)
            pairs.append(
                {
                    "run": name,
                    "reference": other,
                    "verdict": verdict.name,
                    "gates": {gate.gate: gate.status for gate in verdict.gates},
                    "first_steps": next((gate.summary for gate in verdict.gates if gate.gate == "C2"), ""),
                }
            )
        bad = [pair for pair in pairs if pair["verdict"] not in {"PASS", "PASS_IMPROVED"}]
        logger.info("seed %d: %d pairs so far, %d not passed", seed, len(pairs), len(bad))
    return pairs


def _report(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    from statsmodels.stats.proportion import proportion_confint

    def share(count: int, total: int) -> dict[str, Any]:
        low, high = (
            proportion_confint(count, total, alpha=1 - CONFIDENCE, method="beta") if total else (0.0, 1.0)
        )
        return {
            "count": count,
            "total": total,
            "rate": count / total if total else None,
            "interval": [low, high],
        }

    caught = sum(row["caught"] for row in rows)
    alarms = sum(pair["verdict"] not in {"PASS", "PASS_IMPROVED"} for pair in pairs)
    gates = sorted({gate for row in rows for gate in row["gates"]})
    return {
        "schema_version": 1,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {
            "faults": len(rows),
            "caught": caught,
            "healthy_pairs": len(pairs),
            "false_alarms": alarms,
        },
        "detection": share(caught, len(rows)),
        "false_alarm": share(alarms, len(pairs)),
        "confidence": CONFIDENCE,
        "gates": gates,
        "matrix": rows,
        "pairs": pairs,
        "fault_table": [{**asdict(fault), "gates": sorted(fault.gates)} for fault in FAULTS],
        "environment": environment_fingerprint(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
