# SPDX-License-Identifier: Apache-2.0
"""A machine at fault makes a run invalid, never slow; its loss is compared all the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.baselines import Baseline
from harness.baselines.workflow import _refusals
from harness.gates.machine import machine
from harness.grading import compare, grade
from harness.policy import Policy
from harness.records import RunRecord
from harness.records.machine import ALL_REDUCE, MATMUL, DeviceTelemetry, MachineFacts
from models.contract.sentinel import Sentinel, When

MakeRecord = Callable[..., RunRecord]
HEALTHY = DeviceTelemetry(
    name="0 NVIDIA H200", num_samples=60, times_s=tuple(range(60)),
    series={"sm_clock_mhz": (1900.0,) * 60, "power_w": (690.0,) * 60, "temperature_c": (60.0,) * 60,
            "utilization": (0.99,) * 60},
    held_down={"power cap": 0.9}, throttled=0.0, max_sm_clock_mhz=1980, power_limit_w=700, default_power_limit_w=700,
    processes_before=0, foreign_processes=0, ecc_errors=0,
)  # fmt: skip


def sentinel(*tflops: float, bandwidth: float | None = None) -> Sentinel:
    return Sentinel(
        started_at="2026-01-05T08:00:00+00:00", device_names=("NVIDIA H200",) * len(tflops), dtype="bfloat16",
        matmul_size=8192, matmul_tflops=tflops, matmul_best_tflops=tflops,
        all_reduce_bytes=0, all_reduce_gb_per_s=bandwidth,
    )  # fmt: skip


def facts(
    *devices: DeviceTelemetry, before: Sentinel | None = None, after: Sentinel | None = None
) -> MachineFacts:
    found: dict[When, Sentinel | None] = {"before": before, "after": after}
    return MachineFacts(
        devices=devices, sentinels={when: value for when, value in found.items() if value is not None}
    )


def judged(
    make_record: MakeRecord,
    policy: Policy,
    machine_facts: MachineFacts,
    baseline: Any = None,
    hw: str = "h200",
) -> Any:
    return machine(make_record(machine=machine_facts), baseline, policy, hardware=hw)


def test_a_record_that_tells_nothing_of_its_machine_is_not_judged(
    make_record: MakeRecord, policy: Policy
) -> None:
    assert machine(make_record(), None, policy, hardware="h200") is None


def test_a_healthy_machine_passes_and_says_what_it_can_do(make_record: MakeRecord, policy: Policy) -> None:
    found = judged(
        make_record, policy,
        facts(HEALTHY, before=sentinel(790.0, 780.0, bandwidth=400.0), after=sentinel(785.0, 800.0, bandwidth=420.0)),
    )  # fmt: skip
    assert (found.status, found.blocks) == ("pass", True)
    assert found.summary == (
        "matrix product 782.5 TFLOP/s, all-reduce 410 GB/s, clock 1900 MHz, not throttled, not shared"
    )
    assert found.details == {
        "is_at_fault": False,
        MATMUL: 782.5,
        ALL_REDUCE: 410.0,
        "throttled": 0.0,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"throttled": 0.011, "held_down": {"power cap": 0.9, "power brake": 0.011}},
         "device 0 NVIDIA H200 was throttled in 1.1% of the time: power brake 1.1%"),
        ({"processes_before": 1}, "was shared: 1 process(es) before the run began"),
        ({"foreign_processes": 2}, "was shared: 2 process(es) of others"),
        ({"ecc_errors": 1}, "had 1 uncorrected memory error(s)"),
    ],
)  # fmt: skip
def test_a_device_at_fault_is_named(
    change: dict[str, Any], words: str, make_record: MakeRecord, policy: Policy
) -> None:
    found = judged(make_record, policy, facts(HEALTHY, replace(HEALTHY, **change)))
    assert found.status == "invalid"
    assert words in found.summary
    on_cpu = judged(make_record, policy, facts(replace(HEALTHY, **change)), hw="cpu")
    assert (on_cpu.status, on_cpu.blocks) == ("warn", False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"throttled": 0.01, "held_down": {"power brake": 0.01}}, "clock 1900 MHz"),  # at the limit, and not above
        ({"power_limit_w": 500.0}, "device 0 NVIDIA H200 is limited to 500 of 700 W"),
        ({"power_limit_w": float("nan")}, "clock 1900 MHz"),
        ({"num_samples": 0}, "was not seen while it trained"),
    ],
)  # fmt: skip
def test_what_is_no_fault_does_not_block(
    change: dict[str, Any], words: str, make_record: MakeRecord, policy: Policy
) -> None:
    found = judged(make_record, policy, facts(replace(HEALTHY, **change)))
    assert found.status in ("pass", "warn")
    assert words in found.summary


def test_a_machine_that_became_slower_is_at_fault(make_record: MakeRecord, policy: Policy) -> None:
    slower = judged(make_record, policy, facts(before=sentinel(790.0, 800.0), after=sentinel(810.0, 750.0)))
    assert slower.status == "invalid"
    assert "from 790 to 750 TFLOP/s (-5.1%) during the run" in slower.summary
    equal = judged(make_record, policy, facts(before=sentinel(790.0), after=sentinel(752.0)))
    assert equal.status == "pass"  # -4.8%
    faster = judged(make_record, policy, facts(before=sentinel(700.0), after=sentinel(790.0)))
    assert faster.status == "pass"


def test_a_machine_slower_than_the_baselines_is_at_fault(
    make_record: MakeRecord, make_baseline: Callable[..., Baseline], policy: Policy
) -> None:
    runs = [
        make_record(seed, machine=facts(before=sentinel(rate, bandwidth=400.0)))
        for seed, rate in ((1, 780.0), (2, 790.0), (3, 900.0))
    ]
    baseline = make_baseline(*runs)
    assert [run.machine for run in baseline.runs][1] == {MATMUL: 790.0, ALL_REDUCE: 400.0}
    assert Baseline.model_validate_json(baseline.model_dump_json()) == baseline
    slow = judged(make_record, policy, facts(before=sentinel(740.0, bandwidth=395.0)), baseline)
    assert (slow.status, slow.summary) == (
        "invalid", "a slow machine: matrix product 740 TFLOP/s, on the baseline's 790 (-6.3%)",
    )  # fmt: skip
    narrow = judged(make_record, policy, facts(before=sentinel(780.0, bandwidth=300.0)), baseline)
    assert narrow.summary == "a slow machine: all-reduce 300 GB/s, on the baseline's 400 (-25.0%)"
    assert judged(make_record, policy, facts(before=sentinel(760.0)), baseline).status == "pass"
    unmeasured = make_baseline()
    assert judged(make_record, policy, facts(before=sentinel(1.0)), unmeasured).status == "pass"


@pytest.fixture
def on_h200(
    make_record: MakeRecord, make_baseline: Callable[..., Baseline]
) -> Callable[..., tuple[Any, Any]]:
    """A run and a baseline that claim an H200."""

    def record_of(seed: int, **fields: Any) -> RunRecord:
        info = make_record(seed).info
        assert info is not None
        hardware = {
            "kind": "cuda",
            "device_name": "NVIDIA H200",
            "device_count": 1,
            "memory_bytes": 150 * 10**9,
        }
        return make_record(seed, info={"hardware": hardware}, **fields)

    def make(machine_facts: MachineFacts, columns: dict[str, Any] | None = None) -> tuple[Any, Any]:
        baseline = make_baseline(*(record_of(seed) for seed in (1, 2, 3)))
        key = baseline.key.model_copy(update={"hardware": "h200"})
        return record_of(4, machine=machine_facts, columns=columns), baseline.model_copy(update={"key": key})

    return make


def slowed(record: RunRecord) -> dict[str, Any]:
    times = [name for name in record.series if name.endswith("_time_ms")]
    return {name: np.asarray(record.values(name)) * 1.4 for name in times}


def test_a_throttled_run_is_invalid_and_not_slow(
    on_h200: Callable[..., tuple[Any, Any]], make_record: MakeRecord, policy: Policy
) -> None:
    slow = slowed(make_record(4))
    record, baseline = on_h200(facts(HEALTHY), slow)
    assert grade(record, baseline, policy, hardware="h200").name == "REGRESSION"
    throttled = replace(HEALTHY, throttled=0.3, held_down={"hardware thermal": 0.3})
    record, baseline = on_h200(facts(throttled), slow)
    verdict = grade(record, baseline, policy, hardware="h200")
    assert verdict.name == "INVALID"
    statuses = {gate.gate: gate.status for gate in verdict.gates}
    assert (statuses["machine"], statuses["throughput"], statuses["C3"]) == ("invalid", "not_run", "pass")


def test_a_run_of_a_machine_at_fault_is_no_reference(
    on_h200: Callable[..., tuple[Any, Any]], policy: Policy
) -> None:
    shared, _ = on_h200(facts(replace(HEALTHY, processes_before=1)))
    healthy, _ = on_h200(facts(HEALTHY))
    assert compare(shared, healthy, policy).name == "INVALID"
    verdict = compare(healthy, shared, policy)
    assert verdict.name == "INVALID"
    assert "reference" in verdict.gates[0].summary
    assert any("was shared" in text for text in _refusals([shared] * policy.baseline.min_runs, policy))
