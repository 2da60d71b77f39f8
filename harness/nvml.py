# SPDX-License-Identifier: Apache-2.0
"""NVIDIA devices through NVML: what they are, and what they do now. Every reading a device does not offer is None."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
"""Bits of nvmlClocksEventReasons (nvml.h) that hold a clock down, without idling and clocks that were asked for."""


def visible_devices(visible: str | None, count: int) -> list[int | str]:
    """Indices or UUIDs of ``CUDA_VISIBLE_DEVICES``; all devices where it is not set.

    CUDA stops reading at the first entry that is no device.
    """
    if visible is None:
        return list(range(count))
    found: list[int | str] = []
    for item in map(str.strip, visible.split(",")):
        if item.isdecimal() and int(item) < count:
            found.append(int(item))
        elif item.startswith(("GPU-", "MIG-")):
            found.append(item)
        else:
            break
    return found


class Device:
    """One device."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def facts(self) -> dict[str, Any]:
        """What does not change while a run lasts, and who was there before it."""
        nvml, read = self._nvml, self._read
        processes = read(nvml.nvmlDeviceGetComputeRunningProcesses)
        return {
            "index": read(nvml.nvmlDeviceGetIndex),
            "name": _text(read(nvml.nvmlDeviceGetName)),
            "max_sm_clock_mhz": read(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "power_limit_w": _scaled(read(nvml.nvmlDeviceGetEnforcedPowerLimit), 1e3),
            "default_power_limit_w": _scaled(read(nvml.nvmlDeviceGetPowerManagementDefaultLimit), 1e3),
            "processes_before": None if processes is None else len(processes),
            "ecc_errors_before": self._ecc_errors(),
        }

    def sample(self, is_ours: Callable[[int], bool]) -> dict[str, Any]:
        """What the device does now. `is_ours` tells the processes of the run by their id."""
        nvml, read = self._nvml, self._read
        utilization, memory = read(nvml.nvmlDeviceGetUtilizationRates), read(nvml.nvmlDeviceGetMemoryInfo)
        reasons = read(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        processes = read(nvml.nvmlDeviceGetComputeRunningProcesses)
        return {
            "sm_clock_mhz": read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            "power_w": _scaled(read(nvml.nvmlDeviceGetPowerUsage), 1e3),
            "temperature_c": read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            "utilization": None if utilization is None else _scaled(utilization.gpu, 100),
            "memory_used_bytes": None if memory is None else int(memory.used),
            "held_down_by": None
            if reasons is None
            else [name for bit, name in REASONS.items() if reasons & bit],
            "foreign_processes": None
            if processes is None
            else foreign_processes([item.pid for item in processes], is_ours),
            "ecc_errors": self._ecc_errors(),
        }

    def _ecc_errors(self) -> int | None:
        nvml = self._nvml
        return self._read(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One reading; None where the device, the driver or a right does not offer it."""
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None


def foreign_processes(pids: list[int], is_ours: Callable[[int], bool]) -> int:
    """How many of a device's processes are not the run's.

    In a container the driver may count processes in another namespace, where none can be told: then one is taken to
    be the run's, which has one on each device.
    """
    ours = sum(map(is_ours, pids))
    return len(pids) - (ours or min(len(pids), 1))


@contextlib.contextmanager
def opened_devices(visible: str | None, num_devices: int) -> Iterator[list[Device]]:
    """The first `num_devices` visible devices; empty where there is no NVML."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no library
        yield []
        return
    try:
        devices: list[Device] = []
        with contextlib.suppress(pynvml.NVMLError):  # a name of no device: training says so
            for name in visible_devices(visible, pynvml.nvmlDeviceGetCount())[:num_devices]:
                handle = (
                    pynvml.nvmlDeviceGetHandleByIndex(name)
                    if isinstance(name, int)
                    else pynvml.nvmlDeviceGetHandleByUUID(name)
                )
                devices.append(Device(pynvml, handle))
        yield devices
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
