# SPDX-License-Identifier: Apache-2.0
"""Healthy runs graded against each other: whatever is called bad here is a false alarm.

trained     real runs of one seed that differ in thread count, micro-batch size or tensor parallelism, every
            ordered pair; short ones for the first gates, longer ones for the gates of the end of a run
synthetic   made-up 500-iteration curves of an H200 with known noise, each against three others: the throughput
            and memory gates block there, and the end window has its full length
"""

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.baselines import BaselineKey, baseline_of_records
from harness.grading import compare, grade
from harness.policy import Policy
from harness.records import load_record
from harness.verdict import Verdict
from models.contract.record import RUN_FILE
from suites.detection.judging import SUITE, SYNTHETIC_GPU
from suites.detection.synthetic import recipe_of, write_synthetic_run
from suites.detection.training_jobs import Job

PASSED = frozenset({"PASS", "PASS_IMPROVED"})
HOST_SD = 0.002
"""Run-to-run sd of a host's speed."""
RUNS_A_SEED = 4
Pair = dict[str, Any]


def trained_pairs(groups: dict[str, list[Job]], policy: Policy) -> list[Pair]:
    """Every ordered pair inside each group of one seed."""
    pairs: list[Pair] = []
    for jobs in groups.values():
        records = {job.name: load_record(job.run_dir) for job in jobs if (job.run_dir / RUN_FILE).exists()}
        for (name, record), (other, reference) in itertools.permutations(records.items(), 2):
            pairs.append(_pair(name, other, compare(record, reference, policy)))
    return pairs


def synthetic_pairs(folder: Path, num_seeds: int, policy: Policy) -> list[Pair]:
    """Of four runs of each seed, each against a baseline of the other three."""
    pairs: list[Pair] = []
    hosts = random.Random(3)
    for seed in range(1, num_seeds + 1):
        runs = [
            replace(
                SYNTHETIC_GPU, data_seed=seed, run_seed=number, host_factor=1.0 + hosts.gauss(0.0, HOST_SD)
            )
            for number in range(1, RUNS_A_SEED + 1)
        ]
        records = [load_record(write_synthetic_run(folder / f"{seed}-{run.run_seed}", run)) for run in runs]
        key = BaselineKey(suite=SUITE, case="synthetic", recipe_sha=recipe_of(runs[0]).sha(), hardware="h200")
        for number, record in enumerate(records):
            others = [other for other in records if other is not record]
            baseline = baseline_of_records(
                others, key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00"
            )
            verdict = grade(record, baseline, policy, hardware="h200")
            pairs.append(_pair(f"synthetic-{seed}-{number + 1}", f"the other runs of {seed}", verdict))
    return pairs


def is_false_alarm(pair: Pair) -> bool:
    """Whether a healthy pair was not passed; undecided counts as an alarm."""
    return pair["verdict"] not in PASSED


def gate_counts(pairs: list[Pair]) -> dict[str, dict[str, int]]:
    """How often each gate said what."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in pairs:
        for gate, status in pair["gates"].items():
            counts[gate][status] += 1
    return {gate: dict(counts[gate]) for gate in sorted(counts)}


def _pair(name: str, other: str, verdict: Verdict) -> Pair:
    return {
        "run": name,
        "reference": other,
        "verdict": verdict.name,
        "gates": {gate.gate: gate.status for gate in verdict.gates},
        "first_steps": next((gate.summary for gate in verdict.gates if gate.gate == "C2"), ""),
    }
