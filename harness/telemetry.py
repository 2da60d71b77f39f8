# SPDX-License-Identifier: Apache-2.0
"""What the devices did while a run ran: clocks, power, temperature, what held the clocks down, who else was there.

A thread of the launcher reads NVML once a second and appends to `telemetry.jsonl` in the run directory (nodes other
than the first: `telemetry-node-N.jsonl`). The first line says what the devices are, each further one is a sample.
Devices without NVML are not read.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from harness.nvml import Device, opened_devices
from models.contract.record import METRICS_FILE

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0


def telemetry_file(run_dir: Path, node_rank: int = 0) -> Path:
    """Where a node's samples are."""
    return run_dir / ("telemetry.jsonl" if node_rank == 0 else f"telemetry-node-{node_rank}.jsonl")


@contextlib.contextmanager
def telemetry_recorded(
    run_dir: Path,
    *,
    num_devices: int,
    environment: Mapping[str, str],
    marker: tuple[str, str],
    node_rank: int = 0,
    interval_s: float = INTERVAL_S,
) -> Iterator[None]:
    """Sample the devices of this node while the block runs.

    Args:
        run_dir: Where the file goes.
        num_devices: How many of the visible devices the run uses.
        environment: Of the training processes: says which devices they see.
        marker: Variable and value that every process of the run carries.
        node_rank: Of this node.
        interval_s: Between two samples.
    """
    with opened_devices(environment.get("CUDA_VISIBLE_DEVICES"), num_devices) as devices:
        if not devices:
            yield
            return
        stop = threading.Event()
        file = telemetry_file(run_dir, node_rank)
        head = {"devices": [device.facts() for device in devices]}

        def sample() -> None:
            while not stop.wait(interval_s):
                if not file.exists():  # at first, and after a failed attempt took it along
                    _append(file, head)
                _append(file, _sample(devices, run_dir, lambda pid: _carries(pid, marker)))

        thread = threading.Thread(target=sample, name="telemetry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _sample(devices: list[Device], run_dir: Path, is_ours: Callable[[int], bool]) -> dict[str, Any]:
    metrics = run_dir / METRICS_FILE
    return {
        "time_s": round(time.time(), 3),
        "is_training": metrics.is_file() and metrics.stat().st_size > 0,
        "devices": [device.sample(is_ours) for device in devices],
    }


def _append(file: Path, row: dict[str, Any]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:  # a full disk is the run's to report
        logger.debug("%s: %s", file, error)


def _carries(pid: int, marker: tuple[str, str]) -> bool:
    name, value = marker
    try:
        return psutil.Process(pid).environ().get(name) == value
    except (psutil.Error, OSError):
        return False
