# SPDX-License-Identifier: Apache-2.0
"""Peak memory: the largest over steps and ranks against the largest of the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.verdict import GateResult

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline
    from harness.policy import Policy
    from harness.records.record import RunRecord

GIB = 2**30


def memory(record: RunRecord, baseline: Baseline, policy: Policy, *, hardware: str | None) -> GateResult:
    """Fail above the baseline plus 5% or 2 GiB, whichever is less; on a CPU, where it is resident size, warn."""
    if not record.has("peak_memory_bytes") or not baseline.has("peak_memory_bytes"):
        return GateResult(gate="memory", status="not_run", blocks=False, summary="no peak memory to compare")
    ours = float(record.values("peak_memory_bytes").max())
    theirs = max(float(frame["peak_memory_bytes"].to_numpy(dtype=float).max()) for frame in baseline.frames())
    if ours <= 0 or theirs <= 0:
        return GateResult(
            gate="memory", status="not_run", blocks=False, summary="peak memory was not measured"
        )
    limit = theirs + min(policy.memory.margin * theirs, policy.memory.slack_bytes)
    blocks = hardware != "cpu"
    status = "pass" if ours <= limit else "fail" if blocks else "warn"
    return GateResult(
        gate="memory",
        status=status,
        blocks=blocks,
        summary=(
            f"peak {ours / GIB:.2f} GiB, baseline {theirs / GIB:.2f} GiB ({ours / theirs - 1.0:+.1%}), "
            f"limit {limit / GIB:.2f} GiB"
        ),
        effect=ours / theirs - 1.0,
        margin=(-1.0, limit / theirs - 1.0),
    )
