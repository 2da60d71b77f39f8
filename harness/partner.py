# SPDX-License-Identifier: Apache-2.0
"""Judges a run against another of the same session: two engines, or two precisions, on the same samples and weights."""

from dataclasses import replace
from typing import Any

import numpy as np

from harness.baselines import BaselineKey, Match, baseline_of_records
from harness.cases import Case
from harness.grading import CONVERGENCE_GATES, grade
from harness.policy import load_policy
from harness.records import RunRecord
from harness.session import CaseResult, Graded, SessionOptions, write_grading
from harness.verdict import Verdict, verdict_of_gates
from models.contract.errors import RunError

SAME_RUN = frozenset({"name", "description", "notes", "hardware", "checkpoint"})
"""Recipe keys that do not make another run."""


def partner_of(case: Case, known: list[Case], section: str, **values: Any) -> Case:
    """The case of `known` that differs from `case` in these values of one section alone.

    Raises:
        RunError: there is none.
    """
    wanted = case.recipe.model_dump(exclude=set(SAME_RUN))
    wanted[section] |= values
    for other in known:
        if other.hardware == case.hardware and other.recipe.model_dump(exclude=set(SAME_RUN)) == wanted:
            return other
    changes = ", ".join(f"{section}.{key} = {value!r}" for key, value in values.items())
    raise RunError(
        f"no case differs from {case.id} in its [{section}] alone",
        expected=f"a recipe beside it with {changes}",
        fix="extend the same parent in both recipes",
    )


def step_gaps(record: RunRecord, partner: RunRecord, column: str = "lm_loss") -> np.ndarray:
    """Relative difference of every step, ``|a - b| / |b|``.

    Raises:
        RunError: the runs did not take the same steps on the same samples.
    """
    if (
        list(record.series.index) != list(partner.series.index)
        or not (record.series["sample_digest"].to_numpy() == partner.series["sample_digest"].to_numpy()).all()
    ):
        raise RunError("the runs saw other samples", where=f"{record.source} and {partner.source}")
    ours, theirs = record.values(column), partner.values(column)
    return np.abs(ours - theirs) / np.abs(theirs)


def judge_against(
    result: CaseResult,
    partner: CaseResult,
    options: SessionOptions,
    *,
    deciding: frozenset[str] = CONVERGENCE_GATES,
) -> Graded:
    """Judge the loss of one result with the other as its reference; the report then draws both.

    Speed and memory are not compared: they are what two engines differ in. Of the gates on the loss, those that are
    not `deciding` are shown and do not block.

    Raises:
        RunError: one of the two never trained.
    """
    if result.graded is None or partner.graded is None:
        untrained = result if result.graded is None else partner
        raise RunError("a run that never trained cannot be compared", where=str(untrained.run_dir))
    policy = load_policy(options.policy_file) if options.policy_file else load_policy()
    info, other = result.graded.record, partner.graded.record
    key = BaselineKey(
        suite=partner.case.suite, case=partner.case.name, hardware=partner.case.hardware,
        recipe_sha=other.info.recipe_sha if other.info else "",
    )  # fmt: skip
    reference = baseline_of_records(
        [other], key=key, policy=policy, created_at=other.info.started_at if other.info else ""
    )
    judged = grade(
        info,
        reference,
        policy,
        gate_mode=options.gate_mode,
        hardware=result.case.hardware,
        window=options.window,
    )
    gates = tuple(
        replace(gate, blocks=False) if gate.gate in CONVERGENCE_GATES - deciding else gate
        for gate in judged.gates
        if gate.gate not in ("throughput", "memory")
    )
    compared = [gate for gate in gates if gate.gate in deciding and gate.status != "not_run"]
    verdict = Verdict(
        name=verdict_of_gates(gates) if compared else "INCONCLUSIVE",
        gates=gates,
        baseline_id=judged.baseline_id,
        match_level=judged.match_level,
        notes=(*judged.notes, f"compared with {partner.case.id} of the same session"),
    )
    graded = Graded(record=info, match=Match(baseline=reference, level="exact"), verdict=verdict)
    write_grading(result.run_dir, graded, case=result.case, gate_mode=options.gate_mode)
    return graded
