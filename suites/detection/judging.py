# SPDX-License-Identifier: Apache-2.0
"""Grades the planted faults, each as a user's run would be graded."""

import itertools
from dataclasses import replace
from pathlib import Path

from harness.baselines import Baseline, BaselineKey, baseline_of_records, find_for_case
from harness.baselines.store import baseline_path, write_baseline
from harness.grading import grade
from harness.policy import Policy
from harness.records import RunRecord, load_record
from harness.verdict import GateResult, Verdict
from models.contract.errors import BaselineError, RunError
from suites.detection.faults import Fault
from suites.detection.inference_faults import judge_answers
from suites.detection.machine_faults import HEALTHY, MACHINE_FAULTS, write_machine
from suites.detection.record_faults import (
    SPEED_FAULTS,
    copy_record,
    write_faulty_baseline,
    write_faulty_record,
)
from suites.detection.synthetic import SyntheticRun, recipe_of, write_synthetic_run
from suites.detection.training_jobs import TRAINED_AREAS, Workshop, baseline_jobs, train

SUITE, CASE = "detection", "tiny"
SYNTHETIC_GPU = SyntheticRun(hardware="h200", device_name="NVIDIA H200")


def measured_baseline(shop: Workshop, setup: str, policy: Policy) -> Baseline:
    """Of healthy launches, on disk as every baseline is. Raises RunError when a launch is not sound."""
    jobs = baseline_jobs(shop, setup)
    train(jobs, shop)
    records = [load_record(job.run_dir) for job in jobs]
    for record in records:
        verdict = grade(record, None, policy)
        if verdict.name != "NO_BASELINE" or record.info is None:
            raise RunError("a healthy launch is not sound", where=record.source, got=verdict.gates[0].summary)
    assert records[0].info is not None
    sha, started = records[0].info.recipe_sha, records[0].info.started_at
    key = BaselineKey(suite=SUITE, case=f"{CASE}_{setup}", recipe_sha=sha, hardware="cpu")
    baseline = baseline_of_records(records, key=key, policy=policy, created_at=started)
    path = baseline_path(shop.folder / "baselines", key)
    path.unlink(missing_ok=True)
    write_baseline(baseline, path)
    return baseline


def judge(fault: Fault, shop: Workshop, baselines: dict[str, Baseline], policy: Policy) -> Verdict:
    """The verdict on one planted fault."""
    if fault.area in TRAINED_AREAS:
        record = load_record(shop.run_dir(f"fault-{fault.name}"))
        if record.info is None or record.info.outcome.status != "completed":
            return _stopped(record)
        return grade(record, baselines[fault.setup], policy, hardware="cpu")
    if fault.area == "inference":
        return judge_answers(fault, shop)
    if fault.area in ("speed", "machine"):
        return _judge_on_gpu(fault, fresh(shop.folder / "records" / fault.name), policy)
    healthy = shop.run_dir(f"{fault.setup}-healthy-1")
    folder = fresh(shop.folder / "records" / fault.name)
    baseline = baselines[fault.setup]
    if fault.area == "measurement":
        hardware = "h200" if fault.name == "sparse_peak" else "cpu"
        record = load_record(write_faulty_record(healthy, folder, fault.name))
        return grade(record, None if hardware != "cpu" else baseline, policy, hardware=hardware)
    if fault.name == "other_hardware":
        record = load_record(copy_record(healthy, folder))
        return grade(record, baseline, policy, hardware="h100")
    return _judge_baseline_file(fault, shop, folder, healthy, baseline, policy)


def _stopped(record: RunRecord) -> Verdict:
    """A planted fault spoils a run in silence. One that stops it shows nothing about any gate: it is not caught."""
    reason = (record.info.outcome.error or "") if record.info else "; ".join(record.problems)
    return Verdict(name="INFRA_ERROR", notes=(f"the run did not end: {reason[-200:]}",))


def _judge_on_gpu(fault: Fault, folder: Path, policy: Policy) -> Verdict:
    """A made-up GPU run against three made-up launches of the same recipe on the same device, which is watched."""
    references = [replace(SYNTHETIC_GPU, run_seed=seed) for seed in (1, 2, 3)]
    paths = [write_synthetic_run(folder / f"reference-{run.run_seed}", run) for run in references]
    records = [load_record(write_machine(path, HEALTHY)) for path in paths]
    sha = recipe_of(references[0]).sha()
    key = BaselineKey(suite=SUITE, case="synthetic", recipe_sha=sha, hardware="h200")
    baseline = baseline_of_records(records, key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00")
    run = replace(SYNTHETIC_GPU, run_seed=11)
    change_rows, change_info = SPEED_FAULTS.get(fault.name, (None, None))
    path = write_synthetic_run(folder / "run", run, change_rows=change_rows, change_info=change_info)
    write_machine(path, MACHINE_FAULTS.get(fault.name, HEALTHY))
    return grade(load_record(path), baseline, policy, hardware="h200")


def _judge_baseline_file(
    fault: Fault, shop: Workshop, folder: Path, healthy: Path, baseline: Baseline, policy: Policy
) -> Verdict:
    record = load_record(copy_record(healthy, folder))
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


def fresh(folder: Path) -> Path:
    """A folder name below `folder` that is not taken."""
    return next(path for number in itertools.count() if not (path := folder / str(number)).exists())
