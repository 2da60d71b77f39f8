# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802 - the names are NVML's
"""A stand-in for the module ``pynvml``: devices whose state a test sets."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

HW_SLOWDOWN, POWER_CAP, IDLE = 0x08, 0x04, 0x01


class NVMLError(Exception):
    """What NVML raises."""


@dataclass
class FakeDevice:
    """State of one device; None: the device does not offer it."""

    name: str = "NVIDIA H200"
    sm_clock: int | None = 1980
    power_mw: int | None = 650_000
    power_limit_mw: int = 700_000
    temperature: int = 60
    reasons: int | None = POWER_CAP
    pids: list[int] = field(default_factory=list)
    ecc: int | None = 0


class FakeNvml:
    """The functions that the harness calls, over `devices`."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    def __init__(self, *devices: FakeDevice) -> None:
        self.devices = list(devices)

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeDevice:
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeDevice:
        return self.devices[int(uuid.removeprefix("GPU-"))]

    def nvmlDeviceGetIndex(self, device: FakeDevice) -> int:
        return self.devices.index(device)

    def nvmlDeviceGetName(self, device: FakeDevice) -> bytes:
        return device.name.encode()

    def nvmlDeviceGetMaxClockInfo(self, device: FakeDevice, clock: int) -> int:
        return 1980

    def nvmlDeviceGetClockInfo(self, device: FakeDevice, clock: int) -> int:
        return _offered(device.sm_clock) if clock == self.NVML_CLOCK_SM else 3201

    def nvmlDeviceGetEnforcedPowerLimit(self, device: FakeDevice) -> int:
        return device.power_limit_mw

    def nvmlDeviceGetPowerManagementDefaultLimit(self, device: FakeDevice) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, device: FakeDevice) -> int:
        return _offered(device.power_mw)

    def nvmlDeviceGetTemperature(self, device: FakeDevice, sensor: int) -> int:
        return device.temperature

    def nvmlDeviceGetUtilizationRates(self, device: FakeDevice) -> Any:
        return SimpleNamespace(gpu=98, memory=40)

    def nvmlDeviceGetMemoryInfo(self, device: FakeDevice) -> Any:
        return SimpleNamespace(used=2**36, total=2**37)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: FakeDevice) -> int:
        return _offered(device.reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, device: FakeDevice) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in device.pids]

    def nvmlDeviceGetTotalEccErrors(self, device: FakeDevice, kind: int, counter: int) -> int:
        return _offered(device.ecc)


@contextmanager
def nvml_of(monkeypatch: pytest.MonkeyPatch, *devices: FakeDevice) -> Iterator[FakeNvml]:
    """Let the harness see these devices."""
    nvml = FakeNvml(*devices)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", nvml)
        yield nvml


def _offered(value: int | None) -> int:
    if value is None:
        raise NVMLError
    return value
