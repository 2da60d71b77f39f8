# SPDX-License-Identifier: Apache-2.0
"""Runs a case and judges it: inputs, launch, grading, the files beside the run. The plugin and the CLI share it.

<run root>/<suite>/<case>@<hardware>/      run directory of the first launch
<run root>/<suite>/<case>@<hardware>-2/    of the second, with repeats
"""

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness.assets import ensure_inputs
from harness.baselines import (
    Baseline,
    BaselineKey,
    Match,
    baseline_of_records,
    find_for_case,
    find_for_record,
)
from harness.baselines.store import write_baseline
from harness.cases import Case
from harness.gates.machine import RATES, baseline_rate
from harness.grading import GateMode, grade
from harness.hardware import REPOSITORY
from harness.judged import keep_judged
from harness.launch import LaunchResult, Watch, launch_case, require_new
from harness.policy import Policy, load_policy
from harness.records import RunRecord, load_record
from harness.report.collect import GRADING_FILE, VERDICT_FILE, read_json
from harness.sentinel import measure_machine, sentinel_seconds
from harness.verdict import Verdict, verdict_of_gates
from models.contract.cluster import ONE_NODE, Cluster
from models.contract.errors import RunError
from models.contract.record import METRICS_FILE, RUN_FILE
from models.contract.site import Site
from models.contract.whole_file import write_whole

MissingBaseline = Literal["fail", "record", "skip"]
BASELINES = REPOSITORY / "baselines"
RUNS = REPOSITORY / "runs"
REPORTS = REPOSITORY / "reports"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What is the same for every case of a session."""

    run_root: Path
    site: Site = field(default_factory=Site)
    site_file: Path | None = None
    baseline_dir: Path = BASELINES
    policy_file: Path | None = None
    gate_mode: GateMode = "tost"
    window: tuple[int, int] | None = None
    """Iterations of the end-window test; None takes the policy's."""
    time_budget_s: float | None = None
    sentinel_s: float | None = None
    """Seconds of each measurement of the machine; 0 is none; None measures accelerators."""
    cluster: Cluster = ONE_NODE
    """The nodes of every launch, seen from this one."""
    from_logs: Path | None = None
    """Grade what is there instead of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A record, what it was compared with, and the verdict."""

    record: RunRecord
    match: Match
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One launch of a case and its verdict."""

    case: Case
    run_dir: Path
    verdict: Verdict
    launched: LaunchResult | None = None
    graded: Graded | None = None

    @property
    def retried(self) -> int:
        """Starts beyond the first."""
        return len(self.launched.attempts) - 1 if self.launched else 0


def new_run_root(parent: Path = RUNS) -> Path:
    """A folder name for one session: UTC time to the second, with the process id."""
    return parent / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


def run_directory(case: Case, options: SessionOptions, number: int = 1) -> Path:
    """Run directory of the n-th launch of a case."""
    suffix = "" if number == 1 else f"-{number}"
    return options.run_root / case.suite / f"{case.name}@{case.hardware}{suffix}"


def run_case(
    case: Case,
    options: SessionOptions,
    *,
    number: int = 1,
    watch: Watch | None = None,
    use_baseline: bool = True,
) -> CaseResult:
    """Launch a case (or find its log) and judge it; write verdict and grading beside the run.

    Without `use_baseline` the run is judged on soundness alone: whole, finite, physically possible.

    Raises:
        HarnessError: an input is missing, or a baseline or the policy is malformed.
        KeyboardInterrupt: the run was stopped; its directory is whole.
    """
    if options.from_logs is not None:
        record = load_record(find_log(case, options.from_logs))
        source = Path(record.source)
        graded = _judge(record, options, case, use_baseline=use_baseline)
        kept = run_directory(case, options, number)
        name = keep_judged(source, kept)
        write_grading(kept, graded, case=case, gate_mode=options.gate_mode, source=name)
        return CaseResult(case=case, run_dir=source, verdict=graded.verdict, graded=graded)
    ensure_inputs(case, options.site)
    run_dir = run_directory(case, options, number)
    watch = watch or Watch(time_budget_s=options.time_budget_s)
    require_new(run_dir, options.cluster)
    seconds = sentinel_seconds(case, options.sentinel_s)
    measure_machine(case, run_dir, "before", seconds=seconds, cluster=options.cluster)
    launched = launch_case(
        case, run_dir, site_file=options.site_file, num_threads=_threads(case), watch=watch,
        cluster=options.cluster,
    )  # fmt: skip
    if launched.completed:
        measure_machine(case, run_dir, "after", seconds=seconds, cluster=options.cluster)
    if options.cluster.node_rank > 0:  # the first node judges
        name = "PASS" if launched.completed else "INVALID"
        return CaseResult(
            case=case, run_dir=run_dir, launched=launched,
            verdict=Verdict(name=name, notes=("judged on the first node", launched.last.reason)),
        )  # fmt: skip
    if not launched.completed and launched.last.last_iteration == 0:
        # Nothing was measured: what the launcher saw is the whole answer.
        name = "INFRA_ERROR" if launched.last.kind == "infra" else "INVALID"
        verdict = Verdict(name=name, notes=(launched.last.reason,))
        _write_json(run_dir / VERDICT_FILE, verdict.to_dict())
        _write_json(run_dir / GRADING_FILE, _case_facts(case, options.gate_mode))
        return CaseResult(case=case, run_dir=run_dir, verdict=verdict, launched=launched)
    graded = _judge(load_record(run_dir), options, case, use_baseline=use_baseline)
    write_grading(run_dir, graded, case=case, gate_mode=options.gate_mode)
    return CaseResult(case=case, run_dir=run_dir, verdict=graded.verdict, launched=launched, graded=graded)


def grade_record(
    record: RunRecord,
    options: SessionOptions,
    *,
    case: Case | None = None,
    hardware: str | None = None,
    match: Match | None = None,
) -> Graded:
    """Look the baseline up, unless a match is given, and grade."""
    hardware = case.hardware if case else hardware
    if match is None and case is not None:
        match = find_for_case(
            options.baseline_dir, suite=case.suite, case=case.name, hardware=case.hardware, record=record
        )
    match = match or find_for_record(options.baseline_dir, record, hardware=hardware)
    verdict = grade(
        record,
        match.baseline,
        _policy(options),
        gate_mode=options.gate_mode,
        hardware=hardware,
        match_level=match.level,
        notes=match.notes,
        window=options.window,
    )
    return Graded(record=record, match=match, verdict=verdict)


def judge_soundness(record: RunRecord, options: SessionOptions, *, hardware: str | None) -> Graded:
    """Judge what a record says about itself; there is nothing to compare with, and nothing is missing."""
    match = Match(baseline=None, level="none")
    judged = grade(record, None, _policy(options), hardware=hardware)
    own = tuple(gate for gate in judged.gates if gate.gate != "environment")
    name = verdict_of_gates(own) if judged.name == "NO_BASELINE" else judged.name
    verdict = Verdict(name=name, gates=judged.gates, notes=(*judged.notes, "judged on soundness alone"))
    return Graded(record=record, match=match, verdict=verdict)


def write_grading(
    run_dir: Path, graded: Graded, *, case: Case | None, gate_mode: GateMode, source: str = "."
) -> None:
    """Write verdict.json and grading.json: what the report needs, so that it reads nothing else.

    `source` is what the record is read from: a log in the folder, or the folder itself. A run that is judged again
    without its case keeps the case it was judged as.
    """
    file = run_dir / GRADING_FILE
    facts = _case_facts(case, gate_mode)
    if case is None and file.is_file():
        facts |= {key: value for key, value in read_json(file).items() if key in _CASE_KEYS}
    baseline = graded.match.baseline
    _write_json(run_dir / VERDICT_FILE, graded.verdict.to_dict())
    _write_json(
        run_dir / GRADING_FILE,
        {
            **facts,
            "source": source,
            "baseline": _baseline_summary(baseline) if baseline else None,
            "reference": _reference(baseline) if baseline else None,
        },
    )


def record_candidate(result: CaseResult, options: SessionOptions) -> Path:
    """Write a run without baseline as a candidate: kept beside the baselines, not in force, never over another.

    Raises:
        BaselineError: the run holds numbers that are not finite, or the candidate is already there.
    """
    if result.graded is None:
        raise RunError("a run that never trained is no candidate", where=str(result.run_dir))
    record, case = result.graded.record, result.case
    sha = record.info.recipe_sha if record.info else ""
    key = BaselineKey(suite=case.suite, case=case.name, recipe_sha=sha, hardware=case.hardware)
    now = datetime.now(UTC)
    baseline = baseline_of_records(
        [record], key=key, policy=_policy(options), created_at=now.isoformat(timespec="seconds")
    )
    folder = options.baseline_dir / "candidates" / case.hardware / case.suite
    path = folder / f"{case.name}-{now:%Y%m%dT%H%M%S}-{baseline.baseline_id}.json"
    write_baseline(baseline, path)
    return path


def find_log(case: Case, path: Path) -> Path:
    """What to grade for a case: `path` itself, or inside a folder what carries the case's name.

    Raises:
        RunError: nothing in the folder belongs to the case.
    """
    if not path.is_dir() or (path / RUN_FILE).is_file() or (path / METRICS_FILE).is_file():
        return path
    names = [f"{case.suite}/{case.name}@{case.hardware}", f"{case.name}@{case.hardware}", case.name]
    for name in names:
        for candidate in (path / name, path / f"{name}.log"):
            if candidate.exists():
                return candidate
    raise RunError(
        f"no log for case {case.id}",
        where=str(path),
        expected=f"{names[0]}/, {case.name}/ or {case.name}.log",
        fix="name a log file, or put each case's log under the case's name",
    )


def _judge(record: RunRecord, options: SessionOptions, case: Case, *, use_baseline: bool) -> Graded:
    if use_baseline:
        return grade_record(record, options, case=case)
    return judge_soundness(record, options, hardware=case.hardware)


def _policy(options: SessionOptions) -> Policy:
    return load_policy(options.policy_file) if options.policy_file else load_policy()


_CASE_KEYS = ("case", "suite", "hardware", "recipe_file")


def _case_facts(case: Case | None, gate_mode: GateMode) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "case": case.id if case else None,
        "suite": case.suite if case else None,
        "hardware": case.hardware if case else None,
        "recipe_file": str(case.recipe_file) if case else None,
        "gate_mode": gate_mode,
        "graded_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _threads(case: Case) -> int | None:
    if case.hardware != "cpu":
        return None
    # A tiny model gains nothing from a second thread, and another number of threads adds in another order: that is
    # enough to part two curves after a hundred iterations.
    return 1


def _baseline_summary(baseline: Baseline) -> dict[str, Any]:
    return {
        "id": baseline.baseline_id,
        "origin": baseline.origin,
        "key": baseline.key.model_dump(mode="json"),
        "num_runs": len(baseline.runs),
        "created_at": baseline.created_at,
        "machine": {key: rate for key in RATES if (rate := baseline_rate(baseline, key)) is not None},
        "environment": baseline.environment,
    }


def _reference(baseline: Baseline) -> dict[str, Any] | None:
    """Loss of the baseline's runs by iteration: mean, smallest, largest."""
    if not baseline.has("lm_loss"):
        return None
    import pandas as pd

    loss = pd.concat([frame["lm_loss"] for frame in baseline.frames()], axis=1).dropna()
    return {
        "iteration": [int(value) for value in loss.index],
        "mean": loss.mean(axis=1).tolist(),
        "low": loss.min(axis=1).tolist(),
        "high": loss.max(axis=1).tolist(),
    }


def _write_json(file: Path, data: Any) -> None:
    write_whole(file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
