# SPDX-License-Identifier: Apache-2.0
"""What the sampler writes while a run runs is what the reader tells of its machine."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.launch import ATTEMPTS_FILE, RUN_VARIABLE, devices_watched, launch
from harness.records import load_record
from harness.records.machine import read_machine
from harness.telemetry import telemetry_file, telemetry_recorded
from models.contract.record import METRICS_FILE
from suites.detection.synthetic import SyntheticRun, write_synthetic_run
from tests.harness.nvml_double import HW_SLOWDOWN, FakeDevice, nvml_of

MARKER = (RUN_VARIABLE, "a run of a test")
FAST: dict[str, Any] = {"environment": {}, "marker": MARKER, "interval_s": 0.01}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def num_lines(file: Path) -> int:
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def more_samples(file: Path, count: int = 3) -> None:
    before = num_lines(file)
    wait_until(lambda: num_lines(file) >= before + count)


def test_what_is_sampled_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = FakeDevice(), FakeDevice(sm_clock=None, power_limit_mw=500_000, ecc=7)  # errors of another run
    file = telemetry_file(tmp_path)
    with nvml_of(monkeypatch, *devices), telemetry_recorded(tmp_path, num_devices=2, **FAST):
        more_samples(file)
        starting = num_lines(file)
        (tmp_path / METRICS_FILE).write_text("{}\n")
        devices[0].pids, devices[0].ecc = [1, 2, 3], 5
        more_samples(file)
        devices[0].reasons, devices[0].temperature = HW_SLOWDOWN, 91
        more_samples(file, 10)
    first, second = read_machine(tmp_path).devices
    assert (first.name, second.name) == ("0 NVIDIA H200", "1 NVIDIA H200")
    assert first.num_samples == second.num_samples == len(first.times_s) == num_lines(file) - starting
    assert 0.5 < first.throttled == first.held_down["hardware slowdown"] < 1
    assert first.held_down["power cap"] == pytest.approx(1 - first.throttled)
    assert (first.median("sm_clock_mhz"), first.max_sm_clock_mhz) == (1980, 1980)
    assert math.isnan(second.median("sm_clock_mhz"))
    assert (first.median("power_w"), first.largest("temperature_c")) == (650, 91)
    assert (first.foreign_processes, first.processes_before, first.ecc_errors) == (2, 0, 5)
    assert (second.throttled, second.foreign_processes, second.ecc_errors) == (0, 0, 0)
    assert (second.power_limit_w, second.default_power_limit_w) == (500, 700)


def test_who_was_there_before_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(pids=[1])
    with nvml_of(monkeypatch, device), telemetry_recorded(tmp_path, num_devices=1, **FAST):
        device.pids = []
        more_samples(telemetry_file(tmp_path))
    [found] = read_machine(tmp_path).devices
    assert (found.processes_before, found.foreign_processes, found.num_samples) == (1, 0, 0)


def test_processes_of_the_run_are_not_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / METRICS_FILE).write_text("{}\n")
    sleep = [sys.executable, "-c", "input()"]
    name, value = MARKER
    with subprocess.Popen(sleep, stdin=subprocess.PIPE, env=os.environ | {name: value}) as ours:
        device = FakeDevice()
        with nvml_of(monkeypatch, device), telemetry_recorded(tmp_path, num_devices=1, **FAST):
            device.pids = [ours.pid]
            more_samples(telemetry_file(tmp_path))
            assert read_machine(tmp_path).devices[0].foreign_processes == 0
            device.pids = [ours.pid, os.getpid()]
            more_samples(telemetry_file(tmp_path))
        ours.communicate(b"\n")
    assert read_machine(tmp_path).devices[0].foreign_processes == 1


def test_an_attempt_that_is_set_aside_takes_its_samples_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, sys, time\nfrom pathlib import Path\nrun = Path(sys.argv[1])\n"
        "file = run / 'telemetry.jsonl'\n"
        "while not file.exists(): time.sleep(0.01)\n"
        "if not (run / 'attempt-1').exists(): sys.exit('ncclSystemError: RuntimeError: NCCL error')\n"
    )
    run = tmp_path / "run"
    (run / "sentinel-before.json").parent.mkdir()
    (run / "sentinel-before.json").write_text("kept")
    with nvml_of(monkeypatch, FakeDevice()), telemetry_recorded(run, num_devices=1, **FAST):
        result = launch([sys.executable, "-c", program, str(run)], run)
    assert [attempt.kind for attempt in result.attempts] == ["infra", "completed"]
    assert {item.name for item in run.iterdir()} == {
        ATTEMPTS_FILE, "attempt-1", "launch.log", "sentinel-before.json", "telemetry.jsonl",
    }  # fmt: skip
    for folder in (run, run / "attempt-1"):
        assert json.loads(telemetry_file(folder).read_text().splitlines()[0])["devices"][0]["index"] == 0


def test_a_cpu_is_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_watched(hardware: str) -> bool:
        with devices_watched(hardware, tmp_path, 1, {}, 0):
            return "telemetry" in [thread.name for thread in threading.enumerate()]

    with nvml_of(monkeypatch, FakeDevice()):
        assert (is_watched("h200"), is_watched("cpu")) == (True, False)


def test_other_nodes_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / METRICS_FILE).write_text("{}\n")
    for node in (0, 1):
        with (
            nvml_of(monkeypatch, FakeDevice()),
            telemetry_recorded(tmp_path, num_devices=1, node_rank=node, **FAST),
        ):
            more_samples(telemetry_file(tmp_path, node))
    assert {device.name for device in read_machine(tmp_path).devices} == {"0 NVIDIA H200", "1:0 NVIDIA H200"}


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", '{"devices": 3}\n', "not json\n", "\xff"])
def test_a_file_of_something_else_is_a_problem_and_no_crash(text: str, tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", SyntheticRun(train_iters=5))
    telemetry_file(run).write_text(text, encoding="latin-1")
    (run / "sentinel-after.json").write_text(text, encoding="latin-1")
    record = load_record(run)
    assert record.problems == ()
    assert [problem.split(": ")[1] for problem in record.machine.problems] == [
        "sentinel-after.json", "telemetry.jsonl",
    ]  # fmt: skip


def test_a_torn_last_line_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / METRICS_FILE).write_text("{}\n")
    with nvml_of(monkeypatch, FakeDevice()), telemetry_recorded(tmp_path, num_devices=1, **FAST):
        more_samples(telemetry_file(tmp_path), 4)
    whole = read_machine(tmp_path).devices[0].num_samples
    file = telemetry_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    assert read_machine(tmp_path).devices[0].num_samples == whole - 1
