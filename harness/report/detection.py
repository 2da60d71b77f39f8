# SPDX-License-Identifier: Apache-2.0
"""The detection suite's result, as the templates print it: rates with intervals, matrix fault × gate."""

from typing import Any

from harness.report.strings import texts
from models.contract.errors import RunError

Words = dict[str, str]
Row = dict[str, Any]
DETECTION_SCHEMA_VERSION = 2
GATE_ORDER = (
    "C0", "plausibility", "environment", "machine", "baseline", "C1", "C2", "C3", "C4", "C5", "C6", "literal",
    "throughput", "memory", "inference_improvement", "inference_blank",
)  # fmt: skip
_MARKS = {"fail": "●", "invalid": "●", "inconclusive": "◐", "warn": "◐", "pass": "·", "not_run": ""}
_TONES = {"fail": "bad", "invalid": "bad", "inconclusive": "warn", "warn": "warn"}


def check_detection(data: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The data, when it is of this version.

    Raises:
        RunError: it is not.
    """
    wanted = {"summary", "detection", "false_alarm", "healthy_gates", "matrix", "gates", "created_at"}
    if data.get("schema_version") != DETECTION_SCHEMA_VERSION or not wanted <= data.keys():
        raise RunError(
            "not a detection result of this version",
            where=where,
            expected=f"schema_version {DETECTION_SCHEMA_VERSION}",
            got=f"{data.get('schema_version')!r}",
            fix="run `python -m suites.detection.run` again",
        )
    return data


def detection_view(data: dict[str, Any], t: Words) -> Row:
    """What the templates show of one run of the suite."""
    gates = sorted(data["gates"], key=_order)
    summary = data["summary"]
    areas: dict[str, list[Row]] = {}
    for row in data["matrix"]:
        areas.setdefault(row["area"], []).append(_fault(row, gates, t))
    return {
        "created": data["created_at"],
        "is_good": is_good(data),
        "facts": [
            (t["faults_caught"], f"{summary['caught']} / {summary['faults']}", _interval(data["detection"])),
            *(
                (t[f"pairs_{kind}"], f"{share['count']} / {share['total']}", _interval(share))
                for kind, share in data["false_alarm"].items()
                if share["total"]
            ),
        ],
        "note": t["detection_note"].format(runs=summary["healthy_runs"]) if summary["healthy_pairs"] else "",
        "gates": gates,
        "areas": [{"name": t[f"area_{area}"], "rows": rows} for area, rows in areas.items()],
        "healthy": [
            {"kind": t[f"kind_{kind}"], "rows": _healthy(counts)}
            for kind, counts in data["healthy_gates"].items()
            if counts
        ],
    }


def is_good(data: dict[str, Any]) -> bool:
    """Everything caught, no healthy pair of either kind called bad."""
    summary = data["summary"]
    alarms = sum(share["count"] for share in data["false_alarm"].values())
    return summary["caught"] == summary["faults"] and not alarms


def detection_text(data: dict[str, Any]) -> str:
    """One line: figures of a result."""
    t = texts("en")
    return "; ".join(
        f"{name} {value} ({interval})" for name, value, interval in detection_view(data, t)["facts"]
    )


def _fault(row: Row, gates: list[str], t: Words) -> Row:
    expected = set(row["expected_gates"])
    cells = [
        {
            "mark": _MARKS[row["gates"][gate]] if gate in row["gates"] else "",
            "tone": _TONES.get(row["gates"].get(gate, ""), ""),
            "expected": gate in expected,
            "title": f"{row['name']} · {gate}: {row['gates'].get(gate, '–')}",
        }
        for gate in gates
    ]
    return {key: row[key] for key in ("name", "what", "verdict", "caught", "summary")} | {
        "cells": cells,
        "tone": "good" if row["caught"] else "bad",
        "word": t["is_caught" if row["caught"] else "is_missed"],
        "red": ", ".join(sorted(row["red_gates"], key=_order)) or "–",
    }


def _healthy(counts: dict[str, dict[str, int]]) -> list[Row]:
    statuses = ("pass", "warn", "inconclusive", "fail", "invalid", "not_run")
    return [
        {"gate": gate, "counts": [counts[gate].get(status, 0) for status in statuses]}
        for gate in sorted(counts, key=_order)
    ]


def _interval(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f"{share['rate']:.1%} [{low:.1%}, {high:.1%}]"


def _order(gate: str) -> tuple[int, str]:
    return (GATE_ORDER.index(gate) if gate in GATE_ORDER else len(GATE_ORDER), gate)
