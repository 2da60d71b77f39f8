# SPDX-License-Identifier: Apache-2.0
"""What devices can do: rate of a dense matrix product, bandwidth of an all-reduce. The ceiling of a step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed

MATMUL_SIZE = {"cuda": 8192, "npu": 8192, "cpu": 1024}
"""Side of the matrices: large enough to be bound by arithmetic."""
REDUCE_BYTES = {"cuda": 2**28, "npu": 2**28, "cpu": 2**22}
CALLS_A_ROUND = 10
"""Between two waits for the device, whose cost is lost among them."""


def device_name(device: torch.device) -> str:
    """As the driver reports it."""
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def rate_dtype(device: torch.device) -> torch.dtype:
    """What training runs in: bf16 on accelerators, fp32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """TFLOP/s of a dense product."""

    median_tflops: float
    """What the device keeps up, at the clock that its power and heat allow."""
    best_tflops: float
    """Of the fastest round: the ceiling."""


def matmul_rate(device: torch.device, *, seconds: float = 0.0, size: int | None = None) -> MatmulRate:
    """Rate of a product of random square matrices, in as many rounds as fit into `seconds`, at least three."""
    size = size or MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=rate_dtype(device)) for _ in range(2))
    out = torch.empty_like(a)
    times = _round_times(lambda: torch.mm(a, b, out=out), device, seconds)
    flops = 2 * size**3 / 1e12
    return MatmulRate(median_tflops=flops / statistics.median(times), best_tflops=flops / min(times))


def all_reduce_gb_per_s(device: torch.device, *, seconds: float, num_bytes: int | None = None) -> float:
    """Bus bandwidth of an all-reduce over all ranks, GB/s; all ranks call it.

    2 (n - 1) / n of the bytes pass each rank's link, whatever the algorithm (nccl-tests, doc/PERFORMANCE.md).
    """
    num_bytes = num_bytes or REDUCE_BYTES[device.type]
    dtype = rate_dtype(device)
    values = torch.zeros(num_bytes // dtype.itemsize, device=device, dtype=dtype)
    # As many rounds on every rank: they meet in each call.
    pilot = _round_times(lambda: distributed.all_reduce(values), device, 0.0)
    slowest = torch.tensor(statistics.median(pilot), device=device)
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    num_rounds = max(3, int(seconds / (float(slowest) * CALLS_A_ROUND)))
    times = _round_times(lambda: distributed.all_reduce(values), device, 0.0, num_rounds=num_rounds)
    median = torch.tensor(statistics.median(times), device=device)
    distributed.all_reduce(median, op=distributed.ReduceOp.MAX)
    n = distributed.get_world_size()
    return 2 * (n - 1) / n * num_bytes / float(median) / 1e9


def _round_times(
    call: Callable[[], object], device: torch.device, seconds: float, *, num_rounds: int = 3
) -> list[float]:
    """Seconds of one call in each round; one round warms up. At least `num_rounds`, and as many as take `seconds`."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) <= num_rounds or time.perf_counter() - started < seconds:
        _wait(device)
        start = time.perf_counter()
        for _ in range(CALLS_A_ROUND):
            call()
        _wait(device)
        times.append((time.perf_counter() - start) / CALLS_A_ROUND)
    return times[1:]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
