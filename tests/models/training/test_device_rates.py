# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest
import torch
from torch import distributed

from models.training import device_rates

CPU = torch.device("cpu")


def rounds_of(*seconds: float) -> Callable[..., list[float]]:
    return lambda *_, **__: list(seconds)


def test_matmul_rate_is_its_flops_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "_round_times", rounds_of(9.0, 0.5, 0.4))
    found = device_rates.matmul_rate(CPU, size=64)
    assert found.median_tflops == pytest.approx(2 * 64**3 / 0.5 / 1e12)
    assert found.best_tflops == pytest.approx(2 * 64**3 / 0.4 / 1e12)


def test_all_reduce_rate_counts_what_passes_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "_round_times", rounds_of(0.5))
    monkeypatch.setattr(distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    found = device_rates.all_reduce_gb_per_s(CPU, seconds=1.0, num_bytes=2**20)
    assert found == pytest.approx(2 * 3 / 4 * 2**20 / 0.5 / 1e9)


def test_rounds_go_on_for_the_time_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(device_rates.time, "perf_counter", lambda: float(next(clock)))
    calls: list[int] = []
    times = device_rates._round_times(lambda: calls.append(1), CPU, 60.0)
    assert len(calls) == (len(times) + 1) * device_rates.CALLS_A_ROUND  # the first round warms up
    assert len(times) > 10
    assert times == [1 / device_rates.CALLS_A_ROUND] * len(times)
    assert len(device_rates._round_times(lambda: None, CPU, 0.0)) == 3
