# SPDX-License-Identifier: Apache-2.0
"""Finds what a report is made of, in folders: runs, conversion results, samples, the session's other tests.

A run directory may hold, beside what training wrote:

    verdict.json     the verdict (Verdict.to_dict)
    grading.json     case, hardware, gate mode, and the reference it was compared with
    attempts.json    every start

Any folder may hold `conversion.json` (what a conversion compared), `samples.json` (images with what the model said),
`detection.json` (what the detection suite found) and `parity.json` (the measured parity matrix).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.launch import read_attempts
from harness.records import RunRecord, load_record
from harness.report.detection import check_detection
from harness.report.parity import check_parity
from harness.verdict import Verdict
from models.contract.errors import RunError
from models.contract.record import RUN_FILE

VERDICT_FILE = "verdict.json"
GRADING_FILE = "grading.json"
CONVERSION_FILE = "conversion.json"
SAMPLES_FILE = "samples.json"
TESTS_FILE = "tests.jsonl"
DETECTION_FILE = "detection.json"
PARITY_FILE = "parity.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One run of the report."""

    run_dir: Path
    record: RunRecord
    verdict: Verdict | None
    grading: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Case id, or the recipe's name of a run that was never graded, or the folder."""
        info = self.record.info
        return str(self.grading.get("case") or (info.recipe.get("name") if info else "") or self.run_dir.name)

    @property
    def hardware(self) -> str | None:
        """Hardware class this run was graded as."""
        return self.grading.get("hardware")

    @property
    def verdict_name(self) -> str:
        """Name of the verdict, NOT_GRADED without one."""
        return self.verdict.name if self.verdict else "NOT_GRADED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Everything a report shows."""

    entries: tuple[Entry, ...]
    conversions: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, Any], ...] = ()
    tests: tuple[dict[str, Any], ...] = ()
    detections: tuple[dict[str, Any], ...] = ()
    parity: tuple[dict[str, Any], ...] = ()


def collect(paths: list[Path]) -> Collection:
    """Read run directories, or folders that hold some anywhere below.

    Raises:
        RunError: a path does not exist, or nothing to report was found under any of them.
    """
    for path in paths:
        if not path.exists():
            raise RunError(
                "path does not exist", where=str(path), fix="name a run directory or a folder of them"
            )
    found = Collection(
        entries=tuple(_entry(folder) for folder in _run_folders(paths)),
        conversions=tuple(
            {"name": file.parent.name, **read_json(file)} for file in _files(paths, CONVERSION_FILE)
        ),
        samples=tuple(
            {**sample, "folder": str(file.parent)}
            for file in _files(paths, SAMPLES_FILE)
            for sample in read_json(file, list)
        ),
        tests=tuple(test for file in _files(paths, TESTS_FILE) for test in read_tests(file)),
        detections=tuple(
            check_detection(read_json(file), where=str(file)) for file in _files(paths, DETECTION_FILE)
        ),
        parity=tuple(check_parity(read_json(file), where=str(file)) for file in _files(paths, PARITY_FILE)),
    )
    if not any((found.entries, found.conversions, found.tests, found.detections, found.parity)):
        raise RunError(
            "no run directory found",
            where=", ".join(map(str, paths)),
            expected=f"a folder with {RUN_FILE}",
            fix="name the folder that training wrote",
        )
    return found


def read_tests(file: Path) -> list[dict[str, Any]]:
    """Outcome of every test in a reportlog, also of one that was cut off by a kill.

    The worst phase of a test decides; a test that started and never ended is reported as `killed`.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        row = json.loads(line)
        if row.get("$report_type") != "TestReport":
            continue
        known = outcomes.setdefault(
            row["nodeid"], {"nodeid": row["nodeid"], "outcome": "killed", "duration": 0.0, "message": ""}
        )
        known["duration"] += row.get("duration", 0.0)
        if row["outcome"] != "passed" and known["outcome"] not in ("failed", "skipped"):
            known["outcome"] = "failed" if row["outcome"] == "failed" else "skipped"
            known["message"] = _message(row.get("longrepr"))
        elif row["when"] == "teardown" and known["outcome"] == "killed":
            known["outcome"] = "passed"
    return list(outcomes.values())


def _message(longrepr: Any) -> str:
    if isinstance(longrepr, str):
        return longrepr.strip().splitlines()[0] if longrepr.strip() else ""
    if isinstance(longrepr, list) and longrepr:
        return str(longrepr[-1])
    crash = (longrepr.get("reprcrash") if isinstance(longrepr, dict) else None) or {}
    return str(crash.get("message", "")).splitlines()[0] if crash.get("message") else ""


def _run_folders(paths: list[Path]) -> list[Path]:
    names = (RUN_FILE, GRADING_FILE)  # of a foreign log there is the grading alone
    folders = {file.parent.resolve() for name in names for file in _files(paths, name)}
    return sorted(
        folder for folder in folders if not any(part.startswith("attempt-") for part in folder.parts)
    )


def _files(paths: list[Path], name: str) -> list[Path]:
    named = {path.resolve() for path in paths if path.is_file() and path.name == name}
    return sorted(named | {file.resolve() for path in paths for file in path.rglob(name)})


def _entry(folder: Path) -> Entry:
    verdict = folder / VERDICT_FILE
    grading = read_json(folder / GRADING_FILE) if (folder / GRADING_FILE).is_file() else {}
    return Entry(
        run_dir=folder,
        record=load_record(folder / grading.get("source", ".")),
        verdict=Verdict.from_dict(read_json(verdict)) if verdict.is_file() else None,
        grading=grading,
        attempts=read_attempts(folder),
    )


def read_json(file: Path, shape: type = dict) -> Any:
    """The JSON of a file. Raises RunError when it is torn, or holds something else than a `shape`."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            "file is not valid JSON", where=str(file), got=str(error), fix="grade the run again"
        ) from None
    if not isinstance(data, shape):
        raise RunError(
            f"file does not hold a JSON {'list' if shape is list else 'object'}", where=str(file),
            got=type(data).__name__, fix="grade the run again",
        )  # fmt: skip
    return data
