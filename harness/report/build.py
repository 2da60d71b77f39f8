# SPDX-License-Identifier: Apache-2.0
"""Builds the report files from a collection: HTML in both languages, Markdown, JSON."""

import base64
import functools
import io
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from harness.policy import load_policy
from harness.report.collect import Collection, Entry, collect
from harness.report.detection import detection_view, is_good
from harness.report.numbers import CONTROL_RATIO, end_loss, values
from harness.report.parity import parity_failures, parity_view
from harness.report.plots import Line, line_chart
from harness.report.strings import Language, texts
from harness.report.view import (
    SMOOTHING,
    TONE_OF_VERDICT,
    Row,
    Words,
    anchor,
    entry_throughput,
    entry_view,
    layout_text,
    smooth,
)
from harness.scaling import Scaling, scalings
from harness.verdict import VerdictName, worst
from models.contract.record import to_json_number
from models.contract.whole_file import write_whole

TEMPLATES = Path(__file__).parent / "templates"
HTML_FILES: dict[Language, str] = {"en": "report.html", "zh": "report.zh-CN.html"}
MARKDOWN_FILES: dict[Language, str] = {"en": "report.md", "zh": "report.zh-CN.md"}
JSON_FILE = "report.json"
_SPEED_COLUMNS = (
    "step_time",
    "padded",
    "real",
    "megatron_tflops",
    "model_tflops",
    "mfu",
    "ceiling_share",
    "sustained_share",
)
_TONE_OF_OUTCOME = {"passed": "good", "failed": "bad", "killed": "bad", "skipped": "warn"}


def build_report(paths: list[Path], output: Path, *, title: str | None = None) -> Path:
    """Write report.html, report.zh-CN.html, report.md, report.zh-CN.md and report.json into `output`.

    Args:
        paths: Run directories, or folders with some below.
        output: Folder of the report; files of an earlier report are replaced.
        title: Headline; a default in each language.

    Returns: the English HTML file.

    Raises:
        RunError: nothing to report.
    """
    found = collect(paths)
    output.mkdir(parents=True, exist_ok=True)
    created = datetime.now(UTC)
    for language, file in HTML_FILES.items():
        view = report_view(found, language, title=title, created=created)
        other: Language = "zh" if language == "en" else "en"
        write_whole(output / file, _template("report.html").render(**view, other=HTML_FILES[other]))
        write_whole(output / MARKDOWN_FILES[language], _template("report.md").render(**view))
    write_whole(
        output / JSON_FILE, json.dumps(report_data(found, created), indent=1, ensure_ascii=False) + "\n"
    )
    return output / HTML_FILES["en"]


def report_view(found: Collection, language: Language, *, title: str | None, created: datetime) -> Row:
    """What the templates print, in one language."""
    t = texts(language)
    entries = [entry_view(entry, t) for entry in found.entries]
    return {
        "t": t,
        "language": {"en": "en", "zh": "zh-CN"}[language],
        "title": title or t["title"],
        "style": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "created": created.strftime("%Y-%m-%d %H:%M UTC"),
        "host": platform.node(),
        "overall": overall(found, t),
        "entries": entries,
        "controls": list(_controls(found.entries, t)),
        "speed_columns": [t[name] for name in _SPEED_COLUMNS],
        "speed_rows": [row for entry in found.entries if (row := _speed_row(entry))],
        "scalings": list(_scalings(found.entries)),
        "conversions": found.conversions,
        "parity": parity_view(found.parity, t),
        "samples": [_sample(sample) for sample in found.samples],
        "tests": [{**test, "tone": _TONE_OF_OUTCOME[test["outcome"]]} for test in found.tests],
        "detections": [detection_view(data, t) for data in found.detections],
    }


def overall(found: Collection, t: Words) -> Row:
    """The worst verdict of the report; a failed test or conversion without one counts as FAILED."""
    names: list[VerdictName] = [entry.verdict.name for entry in found.entries if entry.verdict]
    broken = [test for test in found.tests if test["outcome"] in ("failed", "killed")]
    wrong = [
        row
        for row in found.conversions
        if row["different"]
        or row["missing"]
        or row["unexpected"]
        or not all(said["is_close"] for said in row.get("logits", ()))
    ]
    ungraded = sum(entry.verdict is None for entry in found.entries)
    if names and TONE_OF_VERDICT[worst(names)] != "good":
        name = worst(names)
        return {"name": name, "meaning": t[name], "tone": TONE_OF_VERDICT[name]}
    if broken or wrong:
        return {
            "name": "FAILED",
            "tone": "bad",
            "meaning": (broken or wrong)[0].get("nodeid", t["different"]),
        }
    if apart := parity_failures(found.parity):
        return {"name": "FAILED", "tone": "bad", "meaning": f"{t['parity']}: {apart[0]}"}
    if not all(map(is_good, found.detections)):
        return {"name": "FAILED", "tone": "bad", "meaning": t["detection"]}
    if names and not ungraded:
        name = worst(names)
        return {"name": name, "meaning": t[name], "tone": TONE_OF_VERDICT[name]}
    if not found.entries:
        return {"name": "PASSED", "meaning": "", "tone": "good"}
    return {"name": "NOT_GRADED", "meaning": t["NOT_GRADED"], "tone": "none"}


def report_data(found: Collection, created: datetime) -> dict[str, Any]:
    """The report as plain data (`report.json`)."""
    words = texts("en")
    return to_json_number(
        {
            "schema_version": 1,
            "created_at": created.isoformat(timespec="seconds"),
            "overall": overall(found, words)["name"],
            "cases": [_entry_data(entry) for entry in found.entries],
            "controls": [{key: row[key] for key in ("name", "loss", "control", "ratio")}
                         for row in _controls(found.entries, words)],
            "scalings": [asdict(scaling) for scaling in _compared(found.entries)],
            "conversions": [{key: row[key] for key in row if key != "tensors"} for row in found.conversions],
            "parity": list(found.parity),
            "samples": [{key: value for key, value in row.items() if key != "folder"} for row in found.samples],
            "tests": list(found.tests),
            "detections": [data["summary"] for data in found.detections],
        }
    )  # fmt: skip


def find_controls(entries: Iterable[Entry]) -> list[tuple[Entry, Entry]]:
    """Pairs (run, control) whose recipes differ in nothing but that the control's images are blank."""
    by_key: dict[str, dict[bool, Entry]] = {}
    for entry in entries:
        if entry.record.info is None:
            continue
        recipe = json.loads(json.dumps(entry.record.info.recipe))
        blank = bool(recipe.get("data", {}).pop("blank_images", False))
        for key in ("name", "description", "notes", "hardware", "checkpoint"):
            recipe.pop(key, None)
        by_key.setdefault(json.dumps(recipe, sort_keys=True), {})[blank] = entry
    return [(pair[False], pair[True]) for pair in by_key.values() if len(pair) == 2]


def _controls(entries: Iterable[Entry], t: Words) -> Iterable[Row]:
    for run, control in find_controls(entries):
        losses = [end_loss(entry.record.series) for entry in (run, control)]
        lines = []
        for entry, style, label in ((run, "mean", t["with_images"]), (control, "control", t["blanked"])):
            series = entry.record.series
            loss = values(series, "lm_loss").tolist()
            curve = smooth(loss) if len(loss) > 2 * SMOOTHING else loss
            lines.append(Line(x=[float(value) for value in series.index], y=curve, style=style, label=label))
        chart = line_chart(lines, title=t["running_mean"], x_label=t["iteration"], y_label="lm_loss")
        ratio = losses[1] / losses[0]
        clear = ratio >= CONTROL_RATIO
        yield {
            "name": run.name, "loss": f"{losses[0]:.4f}", "control": f"{losses[1]:.4f}", "ratio": f"{ratio:.2f} ×",
            "tone": "good" if clear else "bad", "word": t["clear" if clear else "not_clear"], "chart": Markup(chart),
        }  # fmt: skip


def _speed_row(entry: Entry) -> Row | None:
    speed = entry_throughput(entry)
    if speed is None:
        return None
    values = (
        (speed.step_time_ms, "{:,.0f} ms"), (speed.padded_tokens_per_second, "{:,.0f}"),
        (speed.real_tokens_per_second, "{:,.0f}"), (speed.megatron_tflops, "{:,.4g}"),
        (speed.model_tflops, "{:,.4g}"), (speed.mfu, "{:.1%}"),
        (speed.ceiling_share, "{:.1%}"), (speed.sustained_share, "{:.1%}"),
    )  # fmt: skip
    return {
        "name": entry.name, "anchor": anchor(entry), "layout": layout_text(entry),
        "cells": ["–" if value is None else form.format(value) for value, form in values],
    }  # fmt: skip


def _compared(entries: Iterable[Entry]) -> list[Scaling]:
    """The same work a device on more than one number of devices."""
    return [found for found in scalings(entry.record for entry in entries) if len(found.rows) > 1]


def _scalings(entries: Iterable[Entry]) -> Iterable[Row]:
    floor = load_policy().throughput.scaling_floor
    for scaling in _compared(entries):
        for name, row in zip(scaling.names, scaling.rows, strict=True):
            real = row.real_tokens_per_second
            yield {
                "name": name, "device": scaling.device_name, "world_size": row.world_size, "num_runs": row.num_runs,
                "padded": f"{row.padded_tokens_per_second:,.0f}", "real": "–" if real is None else f"{real:,.0f}",
                "efficiency": f"{row.efficiency:.1%}", "tone": "good" if row.efficiency >= floor else "bad",
            }  # fmt: skip


def _entry_data(entry: Entry) -> dict[str, Any]:
    speed, info = entry_throughput(entry), entry.record.info
    return {
        "case": entry.name,
        "run_dir": str(entry.run_dir),
        "hardware": entry.hardware,
        "recipe_sha": info.recipe_sha if info else None,
        "verdict": entry.verdict.to_dict() if entry.verdict else None,
        "end_loss": end_loss(entry.record.series) if "lm_loss" in entry.record.series else None,
        "throughput": asdict(speed) if speed else None,
        "attempts": entry.attempts,
        "problems": list(entry.record.problems),
    }


def _sample(sample: dict[str, Any]) -> Row:
    """A sample with a small copy of its image embedded, so that the report stays one file."""
    image = _thumbnail(Path(sample["folder"]) / sample["image"]) if sample.get("image") else None
    return {"text": "", "prompt": "", "reference": "", **sample, "image": image}


def _thumbnail(file: Path, side: int = 320) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)
