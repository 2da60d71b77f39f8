# SPDX-License-Identifier: Apache-2.0
"""Grading: run record + baseline + policy → verdict. Pure; starts nothing, reads nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from harness.baselines.schema import Baseline, BaselineKey, baseline_of_records, device_name
from harness.baselines.store import hardware_of, published_note, stack_differences
from harness.gates.convergence import end_window, first_forward, first_steps, held_out, literal
from harness.gates.machine import machine
from harness.gates.memory import memory
from harness.gates.pairing import Pairing, pair
from harness.gates.plausibility import plausibility
from harness.gates.sanity import sanity
from harness.gates.throughput import published_arithmetic, published_throughput, throughput
from harness.gates.trajectory import drift, shape
from harness.gates.window import Window
from harness.launch import classify_failure
from harness.policy import Policy
from harness.records.record import RunRecord
from harness.verdict import GateResult, Verdict, VerdictName, verdict_of_gates, worst
from models.contract.errors import BaselineError

GateMode = Literal["tost", "literal", "off"]
CONVERGENCE_GATES = frozenset({"C1", "C2", "C3", "C4", "C5", "C6"})


def grade(
    record: RunRecord,
    baseline: Baseline | None,
    policy: Policy,
    *,
    gate_mode: GateMode = "tost",
    hardware: str | None = None,
    match_level: str | None = None,
    notes: tuple[str, ...] = (),
    window: Window | None = None,
) -> Verdict:
    """Judge one run.

    Args:
        record: The run.
        baseline: What to compare with, or None.
        policy: All margins.
        gate_mode: `tost` lets the convergence ladder decide; `literal` the single-point rule; `off` neither: only
            sanity, plausibility, machine, throughput and memory count.
        hardware: Class the run is claimed to be from; None takes what its own probe found.
        match_level: How the baseline was found; None works it out from the two keys.
        notes: What the look-up had to say.
        window: Iterations that the end-window test compares; None takes the policy's last ones.
    """
    probed = hardware_of(record)
    claimed = hardware or probed
    level = match_level or _match_level(record, baseline, claimed)
    is_published = baseline is not None and baseline.origin == "published"
    comparable = None if is_published else baseline
    same_hardware = comparable is not None and comparable.key.hardware == claimed
    is_comparable = comparable is not None and not record.series.empty and record.has("lm_loss")
    pairing = pair(record, comparable) if comparable is not None and is_comparable else None
    gates = _environment(record, hardware, probed)
    gates.append(
        sanity(
            record, policy, baseline=comparable if level != "other_hardware" else None, pairing=pairing,
            accept_excerpt=gate_mode == "literal",
        )
    )  # fmt: skip
    is_same_device = comparable is not None and same_hardware and _same_device(record, comparable)
    gates.append(
        plausibility(record, policy, hardware=claimed, baseline=comparable if is_same_device else None)
    )
    is_sound = not any(gate.status == "invalid" for gate in gates if gate.gate != "environment")
    # The loss does not depend on it: a machine at fault leaves the loss to be compared, and the step times not.
    ran_on = machine(record, comparable if same_hardware else None, policy, hardware=claimed)
    gates += [ran_on] if ran_on is not None else []
    text = list(notes)
    if baseline is not None and not record.series.empty and record.has("lm_loss"):
        if is_published:
            text.append(published_note(baseline))
            gates += _published_gates(record, baseline, policy, gate_mode)
        elif is_sound and pairing is not None:
            gates += _measured_gates(
                record, baseline, policy, pairing, gate_mode, level=level, hardware=claimed, window=window,
                ran_on=ran_on,
            )  # fmt: skip
    names = _verdicts(record, baseline, gates, gate_mode, level)
    if not is_sound and baseline is not None and not is_published:
        text.append("the record is not sound: it was not compared with the baseline")
    if baseline is not None and level == "stack_drift":
        changes = stack_differences(baseline, record)
        text.append(
            "stack drift: " + ", ".join(f"{key} {old} → {new}" for key, (old, new) in changes.items())
        )
    return Verdict(
        name=worst(names),
        gates=tuple(gates),
        baseline_id=baseline.baseline_id if baseline else None,
        match_level=level,
        notes=tuple(dict.fromkeys((*text, *record.notes))),
    )


def compare(
    record: RunRecord,
    reference: RunRecord,
    policy: Policy,
    *,
    gate_mode: GateMode = "tost",
    window: Window | None = None,
) -> Verdict:
    """Judge one run against another as if that were its baseline, with a single run to learn noise from.

    The reference must be sound itself; otherwise the verdict is INVALID and says so.
    """
    own = (
        sanity(reference, policy, accept_excerpt=gate_mode == "literal"),
        plausibility(reference, policy, hardware=hardware_of(reference)),
        machine(reference, None, policy, hardware=hardware_of(reference)),
    )
    unsound = [gate for gate in own if gate is not None and gate.status == "invalid"]
    if unsound:
        return Verdict(
            name="INVALID",
            gates=tuple(
                replace(gate, summary=f"reference {reference.source}: {gate.summary}") for gate in unsound
            ),
            notes=("the reference run is not sound: nothing was compared",),
        )  # fmt: skip
    info = reference.info
    key = BaselineKey(
        suite="compare", case=reference.source, recipe_sha=info.recipe_sha if info else "",
        hardware=hardware_of(reference) or "unknown",
    )  # fmt: skip
    try:
        baseline = baseline_of_records(
            [reference], key=key, policy=policy, created_at=info.started_at if info else ""
        )
    except BaselineError as error:
        return Verdict(
            name="INVALID", notes=(f"the reference run cannot be compared with: {error.what}: {error.got}",)
        )
    note = "one reference run: noise from run to run is unknown and not in the intervals"
    return grade(record, baseline, policy, gate_mode=gate_mode, notes=(note,), window=window)


def _environment(record: RunRecord, claimed: str | None, probed: str | None) -> list[GateResult]:
    """A claim that the run's own probe contradicts."""
    # A run that died before its first iteration may not have looked at its machine yet.
    if claimed is None or record.info is None or claimed == probed or record.series.empty:
        return []
    name = device_name(record) or "an unnamed device"
    text = f"{claimed} was asked for, the run's probe found {probed or 'no known class'} ({name})"
    return [GateResult(gate="environment", status="fail", blocks=True, summary=text)]


def _measured_gates(
    record: RunRecord,
    baseline: Baseline,
    policy: Policy,
    pairing: Pairing,
    mode: GateMode,
    *,
    level: str,
    hardware: str | None,
    window: Window | None,
    ran_on: GateResult | None,
) -> list[GateResult]:
    same = level != "other_hardware"
    gates: list[GateResult] = []
    if baseline.has("lm_loss"):
        factor = 1.0 if same else policy.end_window.other_hardware_factor
        gates += [
            first_forward(
                record, baseline, policy, pairing, same_hardware=same and _same_device(record, baseline)
            ),
            first_steps(record, baseline, policy, pairing),
            end_window(record, baseline, policy, pairing, factor=factor, window=window),
            literal(record, baseline, policy, blocks=mode == "literal"),
            drift(record, baseline, policy, pairing),
            shape(record, baseline, policy, pairing),
            held_out(record, baseline, policy),
        ]
    if mode != "tost" or not same:
        gates = [replace(gate, blocks=False) if gate.gate in CONVERGENCE_GATES else gate for gate in gates]
    if mode == "off":
        gates = [gate for gate in gates if gate.gate == "literal"]
    if same:
        if ran_on is not None and ran_on.status == "invalid":
            text = "step times of a machine at fault say nothing of the code"
            gates.append(GateResult(gate="throughput", status="not_run", blocks=False, summary=text))
        else:
            reason = _advisory_reason(record, baseline, hardware)
            gates.append(throughput(record, baseline, policy, hardware=hardware, advisory_because=reason))
        gates.append(memory(record, baseline, policy, hardware=hardware))
    return gates


def _published_gates(
    record: RunRecord, baseline: Baseline, policy: Policy, mode: GateMode
) -> list[GateResult]:
    return [
        literal(record, baseline, policy, blocks=mode == "literal"),
        published_arithmetic(record, baseline),
        published_throughput(record, baseline, policy),
    ]


def _verdicts(
    record: RunRecord, baseline: Baseline | None, gates: list[GateResult], mode: GateMode, level: str
) -> list[VerdictName]:
    """Everything that is true of the run; the worst is the verdict."""
    is_gain = any(gate.blocks and gate.details.get("is_gain") for gate in gates)
    judged = [gate for gate in gates if gate.gate != "environment"]
    names: list[VerdictName] = [verdict_of_gates(judged, improved=is_gain)]
    if any(gate.gate == "environment" for gate in gates):
        names.append("ENV_MISMATCH")
    if _died_before_training(record):
        # Nothing was measured, so nothing about the measurement is invalid.
        return ["INFRA_ERROR", *(name for name in names if name == "ENV_MISMATCH")]
    is_literal_answered = mode == "literal" and any(
        gate.gate == "literal" and gate.status in {"pass", "fail"} for gate in gates
    )
    needs_more = mode == "tost" and level in {"published", "other_hardware"}
    lacks_loss = baseline is not None and not baseline.has("lm_loss")
    compared = [gate for gate in gates if gate.gate in CONVERGENCE_GATES and gate.blocks]
    if mode == "tost" and compared and all(gate.status == "not_run" for gate in compared):
        # Nothing of the loss was compared: that it is sound by itself is not a pass.
        names.append("INCONCLUSIVE")
    if baseline is None or needs_more or lacks_loss:
        names.append("NO_BASELINE")
    if mode == "literal" and baseline is not None and not is_literal_answered:
        names.append("NO_BASELINE" if "lm_loss" in record.known else "INVALID")
    return names


def _died_before_training(record: RunRecord) -> bool:
    """Ended by the machine (not by our own errors, nor by the code) before the first iteration."""
    if record.info is None or not record.series.empty:
        return False
    outcome = record.info.outcome
    if outcome.status != "failed" or outcome.phase != "startup" or not outcome.error:
        return False
    log = re.sub(r"^rank \d+: ", "", outcome.error)
    kind, _ = classify_failure(exit_code=1, log=log, last_iteration=0, phase=outcome.phase)
    return kind == "infra"


def _match_level(record: RunRecord, baseline: Baseline | None, hardware: str | None) -> str:
    if baseline is None:
        return "none"
    if baseline.origin == "published":
        return "published"
    if record.info is not None and baseline.key.hardware != hardware:
        return "other_hardware"
    return "stack_drift" if stack_differences(baseline, record) else "exact"


def _same_device(record: RunRecord, baseline: Baseline) -> bool:
    ours = device_name(record)
    return all(run.device_name == ours for run in baseline.runs)


def _advisory_reason(record: RunRecord, baseline: Baseline, hardware: str | None) -> str:
    if "throughput" in baseline.report_only:
        return "launches of the baseline differ too much to judge by"
    if hardware == "cpu" and not _same_device(record, baseline):
        return f"another CPU ({device_name(record)})"
    if record.world_size != baseline.runs[0].world_size:
        return "another number of devices"
    return ""
