# SPDX-License-Identifier: Apache-2.0
"""Whether a run can be compared with its baseline step by step: same iterations, same samples in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline, BaselineRun
    from harness.records.record import RunRecord

MIN_STEPS_FOR_EVIDENCE = 20
MIN_CORRELATION = 0.9
"""Of step-to-step changes of ln(lm_loss): same batches give 0.99 and more, other batches next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """How a run and a baseline can be compared."""

    mode: Literal["paired", "unpaired", "refused"]
    """refused: not even the iterations agree."""
    reason: str
    first_difference: int | None = None
    """First iteration whose samples differ."""


def pair(record: RunRecord, baseline: Baseline) -> Pairing:
    """Decide how to compare: against the first run of the baseline, whose order the others share or not."""
    run = baseline.runs[0]
    iterations = tuple(int(value) for value in record.series.index)
    if iterations != run.iterations:
        return Pairing(
            mode="refused",
            reason=f"iterations differ: run {_span(iterations)}, baseline {_span(run.iterations)}",
        )
    shift = _consumed_difference(record, run)
    if shift is not None:
        return Pairing(
            mode="refused",
            reason=f"consumed samples differ from iteration {shift} on",
            first_difference=shift,
        )
    if run.sample_digests and record.has("sample_digest"):
        return _by_step_digest(record, run)
    ours = record.info.data_order_digest if record.info else None
    if ours and run.data_order_digest:
        if ours == run.data_order_digest:
            return Pairing(mode="paired", reason="same data-order digest")
        return Pairing(mode="unpaired", reason="data-order digests differ")
    return _by_evidence(record, run)


def paired_log_ratios(record: RunRecord, baseline: Baseline, column: str) -> np.ndarray:
    """``ln(run / baseline)`` a step, the baseline being the geometric mean over its runs."""
    references = np.mean([np.log(frame[column].to_numpy()) for frame in baseline.frames()], axis=0)
    return np.log(record.values(column)) - references


def _by_step_digest(record: RunRecord, run: BaselineRun) -> Pairing:
    for iteration, ours, theirs in zip(
        run.iterations, record.series["sample_digest"], run.sample_digests, strict=True
    ):
        if ours != theirs:
            return Pairing(
                mode="unpaired",
                reason=f"data order differs from iteration {iteration} on",
                first_difference=iteration,
            )
    return Pairing(mode="paired", reason="same samples at every iteration")


def _by_evidence(record: RunRecord, run: BaselineRun) -> Pairing:
    """Without digests: batches of the same samples move the loss up and down together."""
    if "lm_loss" not in run.columns or len(run.iterations) < MIN_STEPS_FOR_EVIDENCE:
        return Pairing(
            mode="unpaired", reason="data order unknown, and too few steps to tell from the losses"
        )
    ours = np.diff(np.log(record.values("lm_loss")))
    theirs = np.diff(np.log(run.frame()["lm_loss"].to_numpy()))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all() and ours.std() > 0 and theirs.std() > 0):
        return Pairing(mode="unpaired", reason="data order unknown, and the losses do not tell")
    correlation = float(np.corrcoef(ours, theirs)[0, 1])
    mode = "paired" if correlation >= MIN_CORRELATION else "unpaired"
    return Pairing(
        mode=mode, reason=f"no data-order digest; step-to-step changes correlate with r = {correlation:.3f}"
    )


def _consumed_difference(record: RunRecord, run: BaselineRun) -> int | None:
    if not record.has("consumed_train_samples") or "consumed_train_samples" not in run.columns:
        return None
    ours, theirs = record.values("consumed_train_samples"), run.columns["consumed_train_samples"]
    return next((i for i, a, b in zip(run.iterations, ours, theirs, strict=True) if a != b), None)


def _span(iterations: tuple[int, ...]) -> str:
    return f"{len(iterations)} from {iterations[0]} to {iterations[-1]}" if iterations else "none"
