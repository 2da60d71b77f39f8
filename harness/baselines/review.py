# SPDX-License-Identifier: Apache-2.0
"""Baselines for people: one shown, two compared."""

from __future__ import annotations

import math

import numpy as np

from harness.baselines.schema import Baseline
from harness.baselines.store import flat

DECADES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def show(baseline: Baseline) -> str:
    """A baseline for a person."""
    key, noise = baseline.key, baseline.calibration
    rows = [
        f"{key.suite}/{key.case} on {key.hardware} ({baseline.origin})",
        f"  id          {baseline.baseline_id}",
        f"  supersedes  {baseline.supersedes or 'nothing'}, anchor {baseline.anchor}",
        f"  recorded    {baseline.created_at} by {baseline.author or 'nobody named'}",
        f"  because     {baseline.reason} {baseline.because}",
        f"  recipe      {key.recipe_sha or 'not known'}",
        f"  commit      {baseline.environment.get('commit', 'not known')}",
    ]
    rows += [
        f"  run         {run.run_id}, {len(run.iterations)} iterations, {run.device_name}"
        for run in baseline.runs
    ]
    rows += [f"  {name:<11} {text}" for name, text in summary_metrics(baseline).items()]
    if noise is not None:
        rows.append(
            f"  noise       {noise.num_pairs} A/A pairs; run to run {_percent(noise.run_sd)} of the end loss, "
            f"{_percent(noise.step_time_run_sd)} of step time"
        )
        rows.append(
            f"  detectable  {_percent(noise.loss_minimum_detectable_change)} of the end loss, "
            f"{_percent(noise.step_time_minimum_detectable_change)} of step time"
        )
    if baseline.report_only:
        rows.append(f"  judges not  {', '.join(baseline.report_only)}: reports what it finds")
    rows += [f"  {name:<11} {value}" for name, value in baseline.facts.items()]
    return "\n".join(rows)


def summary_metrics(baseline: Baseline, window: int = 50) -> dict[str, str]:
    """End loss, held-out loss and step time, averaged over the runs."""
    rows: dict[str, str] = {}
    frames = baseline.frames()
    if baseline.has("lm_loss"):
        rows["end loss"] = f"{np.mean([frame['lm_loss'].tail(window).mean() for frame in frames]):.6g}"
    if baseline.has("eval_lm_loss"):
        rows["held-out"] = f"{np.mean([frame['eval_lm_loss'].dropna().iloc[-1] for frame in frames]):.6g}"
    if baseline.has("step_time_ms"):
        rows["step time"] = f"{np.mean([frame['step_time_ms'].median() for frame in frames]):.6g} ms"
    return rows


def change_text(old: Baseline | None, new: Baseline) -> str:
    """Markdown for the review: signed mean relative change a metric, sizes of the changes, what moved beside it."""
    lines = [
        f"# {new.key.suite}/{new.key.case} on {new.key.hardware}: {new.reason}",
        "",
        new.because or "No reason text.",
        "",
    ]
    if old is None:
        return "\n".join([*lines, "No baseline of this case was in force.", "", "```", show(new), "```", ""])
    lines += [f"Replaces `{old.baseline_id}` of {old.created_at}.", ""]
    if old.key.recipe_sha != new.key.recipe_sha:
        lines += [f"The recipe changed: `{old.key.recipe_sha}` to `{new.key.recipe_sha}`.", ""]
    lines += ["| metric | mean change | " + " | ".join(f"≤ {limit:.0e}" for limit in DECADES) + " | larger |"]
    lines += ["|" + "---|" * (len(DECADES) + 3)]
    lines += _change_rows(old, new)
    before, after = flat(old.environment), flat(new.environment)
    moved = {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
    lines += ["", "| environment | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {was} | {now} |" for name, (was, now) in moved.items()]
    return "\n".join([*lines, ""])


def _change_rows(old: Baseline, new: Baseline) -> list[str]:
    """One row a metric both have: signed mean relative change, and how many steps changed by how much."""
    rows: list[str] = []
    before, after = old.runs[0].frame(), new.runs[0].frame()
    common = before.index.intersection(after.index)
    for name in (column for column in after.columns if column in before.columns):
        ours, theirs = after.loc[common, name], before.loc[common, name]
        both = ours.notna() & theirs.notna() & (theirs != 0)
        if not both.any():
            continue
        change = (ours[both] / theirs[both] - 1.0).to_numpy()
        counts = np.histogram(np.abs(change), bins=[-1.0, *DECADES, math.inf])[0]
        rows.append(f"| {name} | {change.mean():+.3%} | " + " | ".join(str(count) for count in counts) + " |")
    return rows


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2%}"
