# SPDX-License-Identifier: Apache-2.0

import pynvml
import pytest

from harness.cli import machine
from harness.hardware import Probe
from harness.nvml import REASONS, Device, foreign_processes, opened_devices, visible_devices
from tests.harness.nvml_double import HW_SLOWDOWN, IDLE, POWER_CAP, FakeDevice, FakeNvml, nvml_of


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]), ("2,0", [2, 0]), (" 1 , 3 ", [1, 3]), ("", []), ("1,9,2", [1]), ("-1", []),
        ("GPU-3,GPU-0", ["GPU-3", "GPU-0"]), ("MIG-aa,1", ["MIG-aa", 1]),
    ],
)  # fmt: skip
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, expected: list[int | str]) -> None:
    assert visible_devices(visible, 4) == expected


@pytest.mark.parametrize(
    ("pids", "ours", "foreign"),
    [
        ([], set(), 0),
        ([7], {7}, 0),
        ([7, 8], {7}, 1),
        ([7, 8], {7, 8}, 0),
        ([4000], set(), 0),  # another namespace: the run's own, as far as anybody can tell
        ([4000, 4001, 4002], set(), 2),
    ],
)
def test_processes_of_others_are_counted(pids: list[int], ours: set[int], foreign: int) -> None:
    assert foreign_processes(pids, ours.__contains__) == foreign


def test_the_bits_are_nvmls() -> None:
    names = {
        "power cap": "SwPowerCap", "hardware slowdown": "HwSlowdown", "sync boost": "SyncBoost",
        "software thermal": "SwThermalSlowdown", "hardware thermal": "HwThermalSlowdown",
        "power brake": "HwPowerBrakeSlowdown",
    }  # fmt: skip
    assert {name: bit for bit, name in REASONS.items()} == {
        ours: getattr(pynvml, f"nvmlClocksThrottleReason{theirs}") for ours, theirs in names.items()
    }


def test_every_function_that_is_called_is_nvmls() -> None:
    called = [name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in called if not hasattr(pynvml, name)] == []


def test_sample_says_what_the_device_does() -> None:
    device = FakeDevice(reasons=POWER_CAP | HW_SLOWDOWN | IDLE, pids=[7, 8], sm_clock=1200)
    found = Device(FakeNvml(device), device).sample(lambda pid: pid == 7)
    assert found == {
        "sm_clock_mhz": 1200, "memory_clock_mhz": 3201, "power_w": 650.0, "temperature_c": 60, "utilization": 0.98,
        "memory_used_bytes": 2**36, "held_down_by": ["power cap", "hardware slowdown"], "foreign_processes": 1,
        "ecc_errors": 0,
    }  # fmt: skip


def test_what_a_device_does_not_offer_is_none() -> None:
    device = FakeDevice(sm_clock=None, power_mw=None, reasons=None, ecc=None)
    found = Device(FakeNvml(device), device).sample(lambda _: True)
    missing = {key for key, value in found.items() if value is None}
    assert missing == {"sm_clock_mhz", "power_w", "held_down_by", "ecc_errors"}


def test_the_devices_of_a_run_are_the_first_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [FakeDevice(name=f"device {number}") for number in range(4)]
    with nvml_of(monkeypatch, *devices), opened_devices("3,GPU-1,0", 2) as opened:
        assert [device.facts()["name"] for device in opened] == ["device 3", "device 1"]


def test_a_host_without_nvml_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", none)
    with opened_devices(None, 8) as opened:
        assert opened == []


def test_doctor_says_what_would_make_times_worthless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = Probe(kind="cuda", device_name="NVIDIA H200", device_count=2, memory_bytes=2**37)
    monkeypatch.setattr(machine, "probe_host", lambda: probe)
    with nvml_of(monkeypatch, FakeDevice(pids=[1, 2]), FakeDevice(power_limit_mw=500_000)):
        machine.doctor(None, as_json=False)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("remark: device")] == [
        "remark: device 0 is in use by 2 process(es): times would be INVALID",
        "remark: device 1 is limited to 500 of 700 W",
    ]
