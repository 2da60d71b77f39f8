# SPDX-License-Identifier: Apache-2.0
"""Verbs that judge and report: grade, compare, report."""

import json
from pathlib import Path
from typing import Any

import typer

from harness.verdict import Verdict
from models.contract.errors import ConfigError
from models.contract.record import RUN_FILE


def one_of(run_or_log: Path | None, from_log: Path | None) -> Path:
    """The one path that was named. Raises ConfigError for none or two."""
    if (run_or_log is None) == (from_log is None):
        raise ConfigError(
            "one thing to grade is needed", expected="a run directory, or --from-log FILE",
            got="both" if run_or_log else "neither",
        )  # fmt: skip
    return run_or_log or from_log or Path()


def grade_path(
    source: Path,
    options: Any,
    *,
    hardware: str | None,
    against: Path | None,
    write: bool,
    as_json: bool,
) -> int:
    """Judge one record, print the verdict, return its exit code."""
    from harness.baselines import Match, load_baseline
    from harness.devices import hardware_class
    from harness.records import load_record
    from harness.session import grade_record, write_grading

    if hardware is not None:
        hardware_class(hardware)
    record = load_record(source)
    match = None
    if against is not None:
        baseline = load_baseline(against)
        match = Match(baseline=baseline, level="published" if baseline.origin == "published" else "exact")
    graded = grade_record(record, options, hardware=hardware, match=match)
    folder = source if source.is_dir() else source.parent
    if write and record.is_run_directory and (folder / RUN_FILE).is_file():
        write_grading(folder, graded, case=None, gate_mode=options.gate_mode)
    _print(graded.verdict, source=record.source, as_json=as_json)
    return graded.verdict.exit_code


def compare_paths(
    run_a: Path, run_b: Path, *, gate_mode: Any, window: str | None, policy_file: Path | None, as_json: bool
) -> int:
    """Judge one record against another, print the verdict, return its exit code."""
    from harness.gates.window import parse_window
    from harness.grading import compare
    from harness.policy import load_policy
    from harness.records import load_record

    wanted = parse_window(window) if window is not None else None
    policy = load_policy(policy_file) if policy_file else load_policy()
    verdict = compare(load_record(run_a), load_record(run_b), policy, gate_mode=gate_mode, window=wanted)
    _print(verdict, source=f"{run_a} against {run_b}", as_json=as_json)
    return verdict.exit_code


def build(paths: list[Path], output: Path | None, title: str | None) -> Path:
    """Build a report; returns its HTML file."""
    from harness.report.build import build_report
    from harness.session import REPORTS

    source = paths[0].resolve()
    # A file may lie in reports/ itself, as the published parity.json does: its report goes beside it.
    name = source.stem if source.is_file() else source.name
    return build_report(paths, output or REPORTS / name, title=title)


def _print(verdict: Verdict, *, source: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"source": source, **verdict.to_dict()}, indent=1, ensure_ascii=False))
        return
    typer.echo(f"{verdict.name} (exit code {verdict.exit_code}): {source}")
    typer.echo(f"  baseline: {verdict.baseline_id or 'none'}, match {verdict.match_level}")
    for gate in verdict.gates:
        mark = gate.status if gate.blocks else f"{gate.status}, advisory"
        typer.echo(f"  {gate.gate:<13}{mark:<24}{gate.summary}")
    for note in verdict.notes:
        typer.echo(f"  note: {note}")
