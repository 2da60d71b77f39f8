# SPDX-License-Identifier: Apache-2.0
"""`qwen-harness baseline …`: how a baseline comes in, changes and goes. There is no verb that overwrites one."""

import getpass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from models.contract.errors import BaselineError, ConfigError

ReasonOption = Literal["new-hw", "stack-bump", "recipe-change", "bugfix", "improvement", "first"]
JudgedGateOption = Literal["throughput"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Propose, review, accept and retire baselines. Nothing overwrites one.",
)
BaselineFile = Annotated[Path, typer.Argument(metavar="FILE", help="Baseline file.")]
Directory = Annotated[
    Path | None,
    typer.Option("--baseline-dir", metavar="DIR", help="Folder of baselines (default: baselines/)."),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="Tolerance policy (default: the reviewed one)."),
]


@app.command()
def propose(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories of at least three launches.")
    ],
    reason: Annotated[ReasonOption, typer.Option(help="Why there is a new baseline.")],
    case: Annotated[
        str | None,
        typer.Option(metavar="SUITE/NAME", help="Case the runs are of (default: as they were judged)."),
    ] = None,
    because: Annotated[
        str, typer.Option(help="Explanation for the reviewer; must be there for a regression.")
    ] = "",
    author: Annotated[str | None, typer.Option(help="Who records it (default: the login name).")] = None,
    report_only: Annotated[
        JudgedGateOption | None,
        typer.Option(
            "--report-only",
            help="Gate that reports and does not judge, where launches differ too much for its margin.",
        ),
    ] = None,
    directory: Directory = None,
    policy: PolicyOption = None,
) -> None:
    """Write a candidate from several launches, with a CHANGE.md for the review. It is not in force.

    Example: `qwen-harness baseline propose runs/a runs/b runs/c --reason first`
    """
    from harness.baselines import workflow
    from harness.records import load_record

    suite, name = _case_of(runs, case)
    proposal = workflow.propose(
        [load_record(run) for run in runs], suite=suite, case=name, directory=_directory(directory),
        policy=_policy(policy), reason=reason, author=author or getpass.getuser(), created_at=_now(), because=because,
        report_only=(report_only,) if report_only else (),
    )  # fmt: skip
    typer.echo(proposal.change)
    typer.echo(f"candidate: {proposal.path}\nreview:    {proposal.change_path}")


@app.command()
def diff(old: BaselineFile, new: BaselineFile) -> None:
    """Print what changes from one baseline file to another: signed mean change a metric, environment.

    Example: `qwen-harness baseline diff baselines/cpu/debug/a.json baselines/candidates/cpu/debug/a.1f.json`
    """
    from harness.baselines import load_baseline, review

    typer.echo(review.change_text(load_baseline(old), load_baseline(new)))


@app.command()
def accept(candidate: BaselineFile, directory: Directory = None, policy: PolicyOption = None) -> None:
    """Put a candidate in force; what it supersedes moves to `retired/`.

    Example: `qwen-harness baseline accept baselines/candidates/cpu/convergence/tiny.1f2e.json`
    """
    from harness.baselines import workflow

    typer.echo(workflow.accept(candidate, directory=_directory(directory), policy=_policy(policy)))


@app.command()
def lint(directory: Directory = None, policy: PolicyOption = None) -> None:
    """Check every baseline: schema, hash, completeness, unique key, recipe hash, ratchet, age. Exit 1 when one is not.

    Example: `qwen-harness baseline lint`
    """
    from harness.baselines import checks

    problems = checks.lint(_directory(directory), _policy(policy), now=_now())
    typer.echo("\n".join(problems) or "all baselines are in order")
    raise typer.Exit(1 if problems else 0)


@app.command()
def show(baseline: BaselineFile) -> None:
    """Print a baseline: key, provenance, runs, noise, what it can detect.

    Example: `qwen-harness baseline show baselines/cpu/convergence/tiny.json`
    """
    from harness.baselines import load_baseline, review

    typer.echo(review.show(load_baseline(baseline)))


@app.command()
def retire(
    baseline: BaselineFile,
    because: Annotated[str, typer.Option(help="Why it no longer holds.")],
    directory: Directory = None,
) -> None:
    """Take a baseline out of force; the file moves to `retired/` and the reason is logged there.

    Example: `qwen-harness baseline retire baselines/cpu/debug/old.json --because "case was removed"`
    """
    from harness.baselines import workflow

    typer.echo(workflow.retire(baseline, directory=_directory(directory), because=because, at=_now()))


def _case_of(runs: list[Path], named: str | None) -> tuple[str, str]:
    """Suite and name of the case: as named, else as all the runs were judged."""
    if named is not None:
        suite, slash, name = named.partition("/")
        if not (suite and slash and name):
            raise ConfigError("not a case", expected="SUITE/NAME", got=named)
        return suite, name
    from harness.report.collect import GRADING_FILE, read_json

    found = set()
    for run in runs:
        file = run / GRADING_FILE
        facts: dict[str, Any] = read_json(file) if file.is_file() else {}
        found.add(
            (str(facts.get("suite") or ""), str(facts.get("case") or "").partition("/")[2].partition("@")[0])
        )
    if len(found) != 1 or not all(next(iter(found))):
        raise BaselineError(
            "the runs do not say one case they are of", got=", ".join("/".join(item) for item in sorted(found)),
            fix="name it with --case SUITE/NAME",
        )  # fmt: skip
    return found.pop()


def _directory(named: Path | None) -> Path:
    from harness.session import BASELINES

    return named or BASELINES


def _policy(file: Path | None) -> Any:
    from harness.policy import load_policy

    return load_policy(file) if file else load_policy()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
