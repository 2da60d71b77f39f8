# SPDX-License-Identifier: Apache-2.0
"""Tells a CI system about verdicts: step summary and annotations on GitHub, a collapsed section on GitLab."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from harness.report.view import decided_by
from harness.verdict import Verdict

_LEVEL_OF_VERDICT = {"INCONCLUSIVE": "warning", "NO_BASELINE": "warning", "PASS_IMPROVED": "notice"}


def announce(report_dir: Path, verdicts: Iterable[tuple[str, Verdict]], stream: TextIO | None = None) -> None:
    """Append the Markdown report to the step summary and print annotations, where the CI system reads them."""
    stream = stream or sys.__stdout__
    if stream is None:
        return
    markdown = report_dir / "report.md"
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and markdown.is_file():
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown.read_text(encoding="utf-8"))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        stream.writelines(line + "\n" for line in github_annotations(verdicts))
    if os.environ.get("GITLAB_CI") == "true" and markdown.is_file():
        stream.write(gitlab_section("qwen_harness_report", "Report", markdown.read_text(encoding="utf-8")))
    stream.flush()


def github_annotations(verdicts: Iterable[tuple[str, Verdict]]) -> list[str]:
    """One workflow command for each verdict that is not a plain PASS."""
    lines = []
    for name, verdict in verdicts:
        if verdict.name == "PASS":
            continue
        level = _LEVEL_OF_VERDICT.get(verdict.name, "error")
        text = decided_by(verdict.gates) or "; ".join(verdict.notes)
        lines.append(
            f"::{level} title={_escape(f'{verdict.name} {name}', is_property=True)}::{_escape(text)}"
        )
    return lines


def gitlab_section(name: str, title: str, text: str) -> str:
    """Text inside a collapsed section of a GitLab job log."""
    now = int(time.time())
    start = f"\x1b[0Ksection_start:{now}:{name}[collapsed=true]\r\x1b[0K{title}\n"
    return f"{start}{text}\n\x1b[0Ksection_end:{now}:{name}\r\x1b[0K\n"


def _escape(text: str, *, is_property: bool = False) -> str:
    """Escape for a workflow command: per cent, line ends, and in a property colon and comma."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text
