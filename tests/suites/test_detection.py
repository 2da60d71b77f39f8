# SPDX-License-Identifier: Apache-2.0
"""The detection suite's own parts: what can be checked without training."""

import json
from pathlib import Path

import pytest

from harness.policy import load_policy
from models.contract.record import RUN_FILE
from suites.detection.checkpoint_faults import CHECKPOINT_FAULTS
from suites.detection.faults import FAULTS, fault_named
from suites.detection.inference_faults import ANSWER_FAULTS, BLIND
from suites.detection.judging import judge
from suites.detection.machine_faults import HEALTHY, MACHINE_FAULTS
from suites.detection.record_faults import BASELINE_FAULTS, RECORD_FAULTS, SPEED_FAULTS
from suites.detection.synthetic import SyntheticRun, write_synthetic_run
from suites.detection.training_jobs import ERROR_FILE, SETUPS, Job, Workshop, has_ended, healthy_jobs

WHERE = {
    "conversion": CHECKPOINT_FAULTS, "measurement": RECORD_FAULTS, "speed": SPEED_FAULTS, "machine": MACHINE_FAULTS,
    "baseline": {**BASELINE_FAULTS, "torn_file": None, "other_hardware": None},
    "inference": {**ANSWER_FAULTS, BLIND: None},
}  # fmt: skip


def job(folder: Path) -> Job:
    return Job(name="a", recipe=folder / "r.toml", run_dir=folder / "run", site=folder / "site.toml")


def test_every_fault_has_a_name_of_its_own_and_a_gate_to_catch_it() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    assert all(fault.gates for fault in FAULTS)
    assert {fault.setup for fault in FAULTS} <= {*SETUPS, "synthetic", "colours"}


@pytest.mark.parametrize("area", WHERE)
def test_every_fault_that_is_not_a_patch_is_made_somewhere(area: str) -> None:
    assert {fault.name for fault in FAULTS if fault.area == area} == set(WHERE[area])


@pytest.mark.parametrize("name", [None, *MACHINE_FAULTS])
def test_a_machine_at_fault_is_seen_by_its_gate_alone(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is None:
        monkeypatch.setitem(MACHINE_FAULTS, "device_taken", HEALTHY)
    fault = fault_named(name or "device_taken")
    verdict = judge(fault, Workshop(folder=tmp_path), {}, load_policy())
    red = [gate.gate for gate in verdict.gates if gate.status in ("fail", "invalid")]
    assert (verdict.name, red) == (("INVALID", ["machine"]) if name else ("PASS", []))


@pytest.mark.parametrize(
    ("status", "is_over"), [("completed", True), ("failed", True), ("running", False), ("interrupted", False)]
)
def test_run_that_was_stopped_half_way_runs_again(status: str, is_over: bool, tmp_path: Path) -> None:
    assert not has_ended(job(tmp_path))
    run = write_synthetic_run(tmp_path / "run", SyntheticRun(train_iters=30))
    info = json.loads((run / RUN_FILE).read_text())
    info["outcome"]["status"] = status
    (run / RUN_FILE).write_text(json.dumps(info))
    assert has_ended(job(tmp_path)) == is_over
    (run / ERROR_FILE).write_text("Traceback")
    assert has_ended(job(tmp_path))


def test_headline_has_two_hundred_pairs_of_real_runs(tmp_path: Path) -> None:
    groups = healthy_jobs(Workshop(folder=tmp_path), num_seeds=5, num_tensor_parallel=2, num_long=2)
    assert sum(len(jobs) * (len(jobs) - 1) for jobs in groups.values()) == 262
    assert all(len({one.run_dir for one in jobs}) == len(jobs) for jobs in groups.values())
