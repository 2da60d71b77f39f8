# SPDX-License-Identifier: Apache-2.0
"""C4 and C5: the whole paired curve, not only its end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from harness import statistics
from harness.gates.pairing import Pairing, paired_log_ratios
from harness.verdict import GateResult

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline
    from harness.policy import Policy
    from harness.records.record import RunRecord


def drift(record: RunRecord, baseline: Baseline, policy: Policy, pairing: Pairing) -> GateResult:
    """C4: signed mean of d = ln(run / baseline) from the drift gate's first iteration on."""
    limits = policy.drift
    if pairing.mode != "paired" or int(record.series.index[-1]) <= limits.first_iteration:
        return _not_run("C4", pairing)
    keep = record.series.index.to_numpy() >= limits.first_iteration
    differences = paired_log_ratios(record, baseline, "lm_loss")[keep]
    mean = float(differences.mean())
    noise = baseline.calibration.drift_sd if baseline.calibration else None
    margin = max(limits.margin, limits.calibration_factor * (noise or 0.0))
    is_within = abs(mean) <= margin
    return GateResult(
        gate="C4",
        status="pass" if is_within else "fail" if limits.blocks else "warn",
        blocks=limits.blocks,
        summary=f"mean from iteration {limits.first_iteration} on {math.expm1(mean):+.2%}, margin ±{margin:.2%}",
        effect=math.expm1(mean),
        margin=(-margin, margin),
    )


def shape(record: RunRecord, baseline: Baseline, policy: Policy, pairing: Pairing) -> GateResult:
    """C5: the largest block mean of d against a simultaneous band for noise like that between healthy runs."""
    limits = policy.shape
    size = limits.block_iterations
    if pairing.mode != "paired" or len(record.series) < 2 * size:
        return _not_run("C5", pairing)
    differences = paired_log_ratios(record, baseline, "lm_loss")
    means = statistics.block_means(differences, size)
    band = max(
        statistics.simultaneous_band(
            noise,
            size,
            confidence=limits.confidence,
            num_resamples=policy.bootstrap_resamples,
            seed=policy.bootstrap_seed,
        )
        for noise in _healthy_differences(baseline, differences)
    )
    margin = max(band, limits.floor)
    worst = int(np.argmax(np.abs(means)))
    first = int(record.series.index[worst * size])
    return GateResult(
        gate="C5",
        status="pass" if abs(means[worst]) <= margin else "warn",
        blocks=False,
        summary=(
            f"largest {size}-iteration mean {math.expm1(means[worst]):+.2%} from iteration {first}, "
            f"{limits.confidence:.0%} band ±{margin:.2%}"
        ),
        effect=math.expm1(float(means[worst])),
        margin=(-margin, margin),
        details={"block_means": [float(value) for value in means]},
    )


def _healthy_differences(baseline: Baseline, differences: np.ndarray) -> list[np.ndarray]:
    """Differences between baseline runs of the same data order; without a pair, the candidate's own, trend removed."""
    logs = [np.log(frame["lm_loss"].to_numpy()) for frame in baseline.frames()]
    digests = [run.data_order_digest for run in baseline.runs]
    gaps = [
        logs[0] - log
        for log, digest in zip(logs[1:], digests[1:], strict=True)
        if digest and digest == digests[0] and len(log) == len(logs[0])
    ]
    return gaps or [statistics.detrend(differences)]


def _not_run(gate: str, pairing: Pairing) -> GateResult:
    why = "too few iterations" if pairing.mode == "paired" else f"not paired: {pairing.reason}"
    return GateResult(gate=gate, status="not_run", blocks=False, summary=why)
