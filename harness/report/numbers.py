# SPDX-License-Identifier: Apache-2.0
"""Throughput and token numbers of one run, each under the one name that says what it counts."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.calibration import steady_rows
from harness.devices import HARDWARE
from harness.policy import Policy, load_policy
from models.contract.flops import tflops_per_gpu, tokens_per_second_per_gpu

CONTROL_RATIO = 1.15
"""A control with blanked images ends at least this much higher than the run it belongs to (mean of the last 50)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Rates over the steady part of a run. None: the record does not hold what it takes.

    Rates are totals over total time, so that a slow step weighs by its length. Per device.
    """

    num_steps: int
    discarded: int
    """First iterations that were left out."""
    step_time_ms: float
    """Median."""
    step_time_p95_ms: float
    padded_tokens_per_second: float | None = None
    real_tokens_per_second: float | None = None
    supervised_tokens_per_second: float | None = None
    samples_per_second: float | None = None
    images_per_second: float | None = None
    pad_fraction: float | None = None
    """1 - real / padded tokens."""
    vision_fraction: float | None = None
    """Vision tokens / real tokens."""
    data_share: float | None = None
    """Share of the step time spent waiting for data."""
    megatron_tflops: float | None = None
    """`megatron_lm_padded`: decoder only, padding included."""
    model_tflops: float | None = None
    """`model_real`: real tokens, vision and audio towers included, no recompute."""
    mfu: float | None = None
    """model_tflops over the dense bf16 peak of the hardware class."""
    ceiling_share: float | None = None
    """model_tflops over the fastest matrix product that was measured beside the run."""
    sustained_share: float | None = None
    """model_tflops over the matrix product that the device keeps up: its power limit lowers both rates."""
    peak_memory_gib: float | None = None


def steady_part(series: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Steps that the throughput gate would judge, and how many iterations before the first of them warm up."""
    steady, _ = steady_rows(series, _policy())
    steady = steady.loc[values(steady, "step_time_ms") > 0]
    warm_up = int(np.sum(series.index.to_numpy() < steady.index[0])) if len(steady) else len(series)
    return steady, warm_up


@functools.cache
def _policy() -> Policy:
    return load_policy()


def values(series: pd.DataFrame, column: str) -> np.ndarray:
    """One column as float64, in iteration order; NaN where the record has no such column."""
    if column not in series:
        return np.full(len(series), math.nan)
    return series[column].to_numpy(dtype=float)


def throughput(
    series: pd.DataFrame,
    *,
    world_size: int,
    hardware: str | None,
    ceiling_tflops: float | None = None,
    sustained_tflops: float | None = None,
) -> Throughput | None:
    """Rates of one run; None when the record has no step times.

    Args:
        series: By iteration.
        world_size: Devices.
        hardware: Class of the devices.
        ceiling_tflops: Of the fastest matrix product measured on one.
        sustained_tflops: Of the one that it keeps up.
    """
    if series.empty or not np.isfinite(values(series, "step_time_ms")).any():
        return None
    steady, discarded = steady_part(series)
    if steady.empty:
        return None
    times = values(steady, "step_time_ms")
    total_ms = float(times.sum())

    def total(column: str) -> float | None:
        found = values(steady, column)
        value = float(np.nansum(found)) if np.isfinite(found).any() else math.nan
        return value if math.isfinite(value) and value > 0 else None

    def rate(column: str) -> float | None:
        counted = total(column)
        if counted is None:
            return None
        return tokens_per_second_per_gpu(counted, step_time_ms=total_ms, world_size=world_size)

    def tflops(column: str) -> float | None:
        flops = total(column)
        return None if flops is None else tflops_per_gpu(flops, step_time_ms=total_ms, world_size=world_size)

    padded, real, vision = (total(f"num_{kind}_tokens") for kind in ("padded", "real", "vision"))
    peak = HARDWARE[hardware].bf16_tflops if hardware in HARDWARE else None
    model_tflops, data_ms, memory = tflops("model_flops"), total("data_time_ms"), total("peak_memory_bytes")
    return Throughput(
        num_steps=len(steady),
        discarded=discarded,
        step_time_ms=float(np.median(times)),
        step_time_p95_ms=float(np.quantile(times, 0.95)),
        padded_tokens_per_second=rate("num_padded_tokens"),
        real_tokens_per_second=rate("num_real_tokens"),
        supervised_tokens_per_second=rate("num_supervised_tokens"),
        samples_per_second=rate("global_batch_size"),
        images_per_second=rate("num_images"),
        pad_fraction=1 - real / padded if padded and real else None,
        vision_fraction=vision / real if vision and real else None,
        data_share=data_ms / total_ms if data_ms else None,
        megatron_tflops=tflops("megatron_flops"),
        model_tflops=model_tflops,
        mfu=model_tflops / peak if model_tflops and peak else None,
        ceiling_share=model_tflops / ceiling_tflops if model_tflops and ceiling_tflops else None,
        sustained_share=model_tflops / sustained_tflops if model_tflops and sustained_tflops else None,
        peak_memory_gib=float(np.nanmax(values(steady, "peak_memory_bytes"))) / 2**30 if memory else None,
    )


def end_loss(series: pd.DataFrame, window: int = 50) -> float:
    """Mean loss of the last `window` iterations, or of all of a shorter run."""
    loss = values(series, "lm_loss")[-window:]
    return float(loss.mean()) if len(loss) else math.nan
