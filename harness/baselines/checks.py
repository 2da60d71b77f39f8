# SPDX-License-Identifier: Apache-2.0
"""What a baseline must satisfy: lint, testable margins, the ratchet cap."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.baselines.schema import Baseline
from harness.baselines.store import RETIRED, baseline_path, baselines_in_force, load_baseline
from harness.calibration import steady_rows
from harness.policy import check_margin
from models.contract.errors import BaselineError, ConfigError
from models.contract.recipe import parse_recipe

if TYPE_CHECKING:
    from harness.policy import Policy

REPORT_ONLY = ", or let the baseline judge the loss alone: `--report-only throughput`"
"""What else helps where launches differ too much, as they do between hosts."""


def lint(directory: Path, policy: Policy, *, now: str) -> list[str]:
    """Everything wrong with the baselines of a folder, one line each; empty when all is well."""
    problems: list[str] = []
    seen: dict[tuple[str, ...], Path] = {}
    for path in baselines_in_force(directory):
        where = str(path.relative_to(directory))
        try:
            baseline = load_baseline(path)
        except BaselineError as error:
            problems.append(f"{where}: {error.what}{f': {error.got}' if error.got else ''}")
            continue
        problems += [f"{where}: {problem}" for problem in _lint_one(baseline, path, directory, policy, now)]
        key = (baseline.key.hardware, baseline.key.suite, baseline.key.case)
        if key in seen:
            problems.append(f"{where}: the same key as {seen[key].relative_to(directory)}")
        seen[key] = path
    return problems


def check_margins(baseline: Baseline, policy: Policy) -> None:
    """Refuse a baseline whose noise does not let the policy's margins be tested, or that does not test what it could.

    Raises:
        ConfigError: a margin is below the minimum detectable change.
        BaselineError: throughput is reported only, though a change of the margin could be detected.
    """
    noise = baseline.calibration
    if noise is None:
        return
    where = f"{baseline.key.suite}/{baseline.key.case} on {baseline.key.hardware}"
    if noise.loss_minimum_detectable_change is not None:
        check_margin(
            "end-window loss", policy.end_window.margin, noise.loss_minimum_detectable_change, where=where
        )
    detectable = noise.step_time_minimum_detectable_change
    if detectable is None:
        return
    margin = -policy.throughput.limits(baseline.key.hardware).fail
    if judges_throughput(baseline, policy):
        check_margin("throughput", margin, detectable, where=where, otherwise=REPORT_ONLY)
    elif "throughput" in baseline.report_only and detectable <= margin:
        raise BaselineError(
            "these launches are calm enough to judge throughput",
            where=where,
            expected=f"a minimum detectable change above the margin of {margin:.1%}",
            got=f"{detectable:.1%}",
            fix="propose them without --report-only throughput",
        )


def judges_throughput(baseline: Baseline, policy: Policy) -> bool:
    """Whether a change of step time blocks."""
    is_advisory = policy.throughput.limits(baseline.key.hardware).advisory
    return not is_advisory and "throughput" not in baseline.report_only


def check_ratchet(baseline: Baseline, directory: Path, policy: Policy) -> None:
    """Refuse a chain of small steps that adds up: drift from the anchor stays within the policy's cap.

    Raises:
        BaselineError: the anchor is gone, or the end loss or step time is further from it than the cap.
    """
    if baseline.anchor_id is None:
        return
    anchor = _by_id(directory, baseline.anchor_id)
    if anchor is None:
        raise BaselineError(
            "the anchor of this baseline is not there",
            where=str(directory),
            expected=f"{RETIRED}/{baseline.anchor_id}.json",
        )
    cap = policy.baseline.ratchet_cap
    for name, change in _drift_from(anchor, baseline, policy).items():
        if abs(change) > cap:
            raise BaselineError(
                f"{name} has drifted {change:+.1%} from the anchor in small steps",
                where=f"{baseline.key.suite}/{baseline.key.case}",
                expected=f"at most {cap:.0%} from {baseline.anchor_id}",
                fix="find out what changed; a wanted change of task starts a new chain (reason recipe-change)",
            )


def _lint_one(baseline: Baseline, path: Path, directory: Path, policy: Policy, now: str) -> list[str]:
    if baseline.origin == "published":
        misplaced = path.relative_to(directory).parts[0] != "published"
        return ["a published reference belongs in published/"] if misplaced else []
    problems: list[str] = []
    if path != baseline_path(directory, baseline.key):
        problems.append(f"belongs at {baseline_path(directory, baseline.key).relative_to(directory)}")
    try:
        recipe = parse_recipe(baseline.recipe, where=str(path))
        if recipe.sha() != baseline.key.recipe_sha:
            problems.append(
                f"recipe hash {baseline.key.recipe_sha} does not follow from the recipe: {recipe.sha()}"
            )
        for run in baseline.runs:
            if run.iterations != tuple(range(1, recipe.train.train_iters + 1)):
                problems.append(f"run {run.run_id} does not hold iterations 1 to {recipe.train.train_iters}")
    except ConfigError as error:
        problems.append(f"recipe is not one of this version: {error.got}")
    if len(baseline.runs) < policy.baseline.min_runs:
        problems.append(f"{len(baseline.runs)} runs, at least {policy.baseline.min_runs} are needed")
    if baseline.policy_version != policy.version:
        problems.append(f"accepted under policy version {baseline.policy_version}, now {policy.version}")
    for check in (
        lambda: check_margins(baseline, policy),
        lambda: check_ratchet(baseline, directory, policy),
    ):
        try:
            check()
        except (BaselineError, ConfigError) as error:
            problems.append(error.what)
    age = datetime.fromisoformat(now) - datetime.fromisoformat(baseline.created_at)
    if age > timedelta(days=policy.baseline.max_age_days):
        problems.append(f"{age.days} days old, at most {policy.baseline.max_age_days}: record it again")
    return problems


def _drift_from(anchor: Baseline, baseline: Baseline, policy: Policy) -> dict[str, float]:
    drifts: dict[str, float] = {}
    if anchor.has("lm_loss") and baseline.has("lm_loss"):
        drifts["end loss"] = math.expm1(_end_log_loss(baseline, policy) - _end_log_loss(anchor, policy))
    if judges_throughput(anchor, policy) and judges_throughput(baseline, policy):
        # Faster is welcome; only slower counts.
        drifts["step time"] = max(_step_time(baseline, policy) / _step_time(anchor, policy) - 1.0, 0.0)
    return drifts


def _end_log_loss(baseline: Baseline, policy: Policy) -> float:
    size = policy.end_window.num_iterations
    return float(np.mean([np.log(frame["lm_loss"].to_numpy()[-size:]).mean() for frame in baseline.frames()]))


def _step_time(baseline: Baseline, policy: Policy) -> float:
    return float(
        np.mean([steady_rows(frame, policy)[0]["step_time_ms"].median() for frame in baseline.frames()])
    )


def _by_id(directory: Path, baseline_id: str) -> Baseline | None:
    retired = directory / RETIRED / f"{baseline_id}.json"
    if retired.exists():
        return load_baseline(retired)
    found = (load_baseline(path) for path in baselines_in_force(directory))
    return next((item for item in found if item.baseline_id == baseline_id), None)
