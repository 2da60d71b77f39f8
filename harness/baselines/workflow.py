# SPDX-License-Identifier: Apache-2.0
"""How a baseline comes in and goes: propose, accept, retire."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.baselines.checks import check_margins, check_ratchet
from harness.baselines.review import change_text
from harness.baselines.schema import (
    REASONS,
    Baseline,
    BaselineKey,
    JudgedGate,
    Reason,
    baseline_of_records,
)
from harness.baselines.store import (
    CANDIDATES,
    RETIRED,
    baseline_path,
    hardware_of,
    load_baseline,
    write_baseline,
)
from harness.gates.machine import machine
from harness.gates.plausibility import plausibility
from harness.gates.sanity import sanity
from harness.grading import grade
from models.contract.errors import BaselineError, ConfigError

if TYPE_CHECKING:
    from harness.policy import Policy
    from harness.records.record import RunRecord

CHANGE_FILE_SUFFIX = ".CHANGE.md"
RETIREMENTS_FILE = "retirements.jsonl"
KEEPS_CHAIN = frozenset({"stack-bump", "bugfix", "improvement"})
"""Reasons that leave the task as it was, so that drift from the anchor is still meant to be small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A candidate on disk, not in force."""

    baseline: Baseline
    path: Path
    change_path: Path
    change: str


def propose(
    records: list[RunRecord],
    *,
    suite: str,
    case: str,
    directory: Path,
    policy: Policy,
    reason: Reason,
    author: str,
    created_at: str,
    because: str = "",
    report_only: tuple[JudgedGate, ...] = (),
) -> Proposal:
    """Write a candidate from several launches, with the text a reviewer needs.

    Raises:
        BaselineError: too few runs, runs that are not sound or not of one recipe, commit and hardware class, a dirty
            tree, no A/A pair, or a regression that nobody explains; gates of `report_only` that could judge.
        ConfigError: the reason is not one of the list, or noise too large for the policy's margins.
    """
    if reason not in REASONS:
        raise ConfigError("unknown reason", expected=", ".join(REASONS), got=reason)
    refusals = _refusals(records, policy)
    if refusals:
        raise BaselineError(
            f"these runs make no baseline: {len(refusals)} reason(s)",
            where=f"{suite}/{case}",
            got="; ".join(refusals),
            fix="record launches of one commit on one host, from a clean tree, and propose again",
        )
    info = records[0].info
    assert info is not None
    key = BaselineKey(
        suite=suite, case=case, recipe_sha=info.recipe_sha, hardware=hardware_of(records[0]) or "unknown"
    )
    old = _in_force(directory, key)
    chain: dict[str, Any] = {
        "reason": reason, "because": because, "author": author, "report_only": report_only,
    }  # fmt: skip
    if old is not None:
        _explain_regression(records, old, policy, because)
        chain["supersedes"] = old.baseline_id
        if reason in KEEPS_CHAIN:
            chain["anchor_id"] = old.anchor
    baseline = baseline_of_records(records, key=key, policy=policy, created_at=created_at, chain=chain)
    check_margins(baseline, policy)
    change = change_text(old, baseline)
    path = directory / CANDIDATES / key.hardware / suite / f"{case}.{baseline.baseline_id}.json"
    write_baseline(baseline, path)
    change_path = path.with_name(path.name.removesuffix(".json") + CHANGE_FILE_SUFFIX)
    change_path.write_text(change, encoding="utf-8")
    return Proposal(baseline=baseline, path=path, change_path=change_path, change=change)


def accept(candidate: Path, *, directory: Path, policy: Policy) -> Path:
    """Put a candidate in force. What it supersedes moves to ``retired/``; nothing is overwritten.

    Raises:
        BaselineError: the candidate is malformed, was made against another baseline than the one now in force, or
            drifts further from the anchor than the policy allows.
    """
    baseline = load_baseline(candidate)
    target = baseline_path(directory, baseline.key)
    old = _in_force(directory, baseline.key)
    if (old.baseline_id if old else None) != baseline.supersedes:
        raise BaselineError(
            "the candidate was made against another baseline than the one in force",
            where=str(candidate),
            expected=f"supersedes {old.baseline_id if old else 'nothing'}",
            got=f"supersedes {baseline.supersedes or 'nothing'}",
            fix="propose again",
        )
    check_margins(baseline, policy)
    check_ratchet(baseline, directory, policy)
    staged = target.with_name(target.name + ".new")
    staged.unlink(missing_ok=True)
    write_baseline(baseline, staged)
    if old is not None:
        _move_to_retired(target, old, directory)
    staged.replace(target)
    candidate.unlink()
    candidate.with_name(candidate.name.removesuffix(".json") + CHANGE_FILE_SUFFIX).unlink(missing_ok=True)
    return target


def retire(path: Path, *, directory: Path, because: str, at: str) -> Path:
    """Take a baseline out of force; its file moves to ``retired/`` and the reason is logged there.

    Raises:
        BaselineError: no such baseline, or no reason given.
    """
    if not because.strip():
        raise BaselineError("a baseline is not retired without a reason", where=str(path), fix="say why")
    baseline = load_baseline(path)
    moved = _move_to_retired(path, baseline, directory)
    entry = {"baseline_id": baseline.baseline_id, **baseline.key.model_dump(), "because": because, "at": at}
    with (directory / RETIRED / RETIREMENTS_FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return moved


def _refusals(records: list[RunRecord], policy: Policy) -> list[str]:
    """Why these runs are no baseline; empty when they are."""
    if len(records) < policy.baseline.min_runs:
        return [f"{len(records)} runs, at least {policy.baseline.min_runs} are needed"]
    found: list[str] = []
    for record in records:
        if record.info is None:
            found.append(f"{record.source}: not a run directory of ours")
            continue
        hardware = hardware_of(record)
        for gate in (
            sanity(record, policy),
            plausibility(record, policy, hardware=hardware),
            machine(record, None, policy, hardware=hardware),
        ):
            if gate is not None and gate.status == "invalid":
                found.append(f"{record.source}: {gate.summary}")
        if record.info.environment.get("dirty") is not False or not record.info.environment.get("commit"):
            found.append(f"{record.source}: not from a clean, committed tree")
    infos = [record.info for record in records if record.info is not None]
    for name, values in {
        "recipe": {info.recipe_sha for info in infos},
        "commit": {info.environment.get("commit") for info in infos},
        "hardware class": {hardware_of(record) for record in records},
        "checkpoint": {info.checkpoint_fingerprint for info in infos},
        "dataset": {info.dataset_fingerprint for info in infos},
    }.items():
        if len(values) > 1:
            found.append(f"the runs differ in {name}: {', '.join(sorted(str(value) for value in values))}")
    # Two launches never take the same time to the last digit; ids have whole seconds.
    if len({tuple(record.values("step_time_ms")) for record in records}) < len(records):
        found.append("one launch is there twice")
    digests = [info.data_order_digest for info in infos]
    if len(set(digests)) == len(digests) or None in digests:
        found.append("no A/A pair: no two runs saw the same samples in the same order")
    return found


def _explain_regression(records: list[RunRecord], old: Baseline, policy: Policy, because: str) -> None:
    if because.strip() or old.key.recipe_sha != (records[0].info.recipe_sha if records[0].info else ""):
        return
    for record in records:
        verdict = grade(record, old, policy)
        if verdict.name == "REGRESSION":
            failed = next(gate for gate in verdict.gates if gate.blocks and gate.status == "fail")
            raise BaselineError(
                "the runs are a regression against the baseline in force, and nobody says why",
                where=record.source,
                got=f"{failed.gate}: {failed.summary}",
                fix="find the cause, or explain it with --because",
            )


def _in_force(directory: Path, key: BaselineKey) -> Baseline | None:
    path = baseline_path(directory, key)
    return load_baseline(path) if path.exists() else None


def _move_to_retired(path: Path, baseline: Baseline, directory: Path) -> Path:
    target = directory / RETIRED / f"{baseline.baseline_id}.json"
    if target.exists():
        raise BaselineError("a retired baseline of this id is already there", where=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return target
