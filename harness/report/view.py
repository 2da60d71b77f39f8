# SPDX-License-Identifier: Apache-2.0
"""Turns one run into what the templates print: formatted numbers, charts, tables; in one language."""

import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from harness.report.collect import Entry
from harness.report.machine import machine_view
from harness.report.numbers import Throughput, end_loss, steady_part, throughput, values
from harness.report.plots import Band, Level, Line, Shade, effect_bar, histogram, line_chart
from harness.verdict import GateResult

Words = dict[str, str]
Row = dict[str, Any]

TONE_OF_VERDICT = {
    "PASS": "good", "PASS_IMPROVED": "good", "REGRESSION": "bad", "INVALID": "bad", "INCONCLUSIVE": "warn",
    "NO_BASELINE": "warn", "ENV_MISMATCH": "bad", "INFRA_ERROR": "bad", "NOT_GRADED": "none",
}  # fmt: skip
TONE_OF_STATUS = {
    "pass": "good", "warn": "warn", "fail": "bad", "invalid": "bad", "inconclusive": "warn", "not_run": "none",
}  # fmt: skip
SMOOTHING = 25
_STATUS_ORDER = ("invalid", "fail", "inconclusive", "warn")


def entry_view(entry: Entry, t: Words) -> Row:
    """Everything the templates show of one run."""
    speed = entry_throughput(entry)
    info = entry.record.info
    verdict = entry.verdict
    gates = verdict.gates if verdict else ()
    return {
        "name": entry.name,
        "anchor": anchor(entry),
        "verdict_name": entry.verdict_name,
        "verdict_meaning": t[entry.verdict_name] if verdict else t["ungraded"],
        "tone": TONE_OF_VERDICT[entry.verdict_name],
        "baseline": verdict.baseline_id if verdict else None,
        "match_level": verdict.match_level if verdict else "",
        "notes": verdict.notes if verdict else (),
        "problems": entry.record.problems,
        "end_loss": f"{end_loss(entry.record.series):.4f}" if _has(entry.record.series, "lm_loss") else "–",
        "step_time": _milliseconds(speed.step_time_ms) if speed else "–",
        "decided_by": decided_by(gates),
        "facts": list(_facts(entry, t)),
        "effects": [_effect(gate) for gate in gates if gate.effect is not None and gate.margin is not None],
        "gates": [_gate(gate) for gate in gates],
        "loss_charts": _loss_charts(entry, t),
        "speed_charts": _speed_charts(entry, t, speed) if speed else [],
        "speed": list(_speed_rows(speed, t)) if speed else [],
        "machine": machine_view(entry, t),
        "environment": environment_differences(entry),
        "environment_note": t["environment_same"] if entry.grading.get("baseline") else t["environment_none"],
        "run_command": shlex.join(info.command) if info else "–",
        "grade_command": grade_command(entry),
        "recipe": json.dumps(info.recipe, indent=1, ensure_ascii=False) if info else "",
        "recipe_sha": info.recipe_sha if info else "",
        "attempts": entry.attempts,
    }


def anchor(entry: Entry) -> str:
    """Id of the run's section."""
    return "".join(letter if letter.isalnum() else "-" for letter in f"{entry.name}-{entry.run_dir.name}")


def entry_throughput(entry: Entry) -> Throughput | None:
    """Rates of the run; None without step times."""
    info = entry.record.info
    return throughput(
        entry.record.series,
        world_size=info.world_size if info else 1,
        hardware=entry.hardware,
        ceiling_tflops=entry.record.machine.ceiling_tflops,
        sustained_tflops=entry.record.machine.matmul_tflops,
    )


def decided_by(gates: tuple[GateResult, ...]) -> str:
    """The summary of the gate that decided: the worst blocking one, else the end window, else the first."""
    for status in _STATUS_ORDER[:3]:
        for gate in gates:
            if gate.blocks and gate.status == status:
                return f"{gate.gate}: {gate.summary}"
    shown = [gate for gate in gates if gate.gate == "C3"] or [
        gate for gate in gates if gate.status != "not_run"
    ]
    return f"{shown[0].gate}: {shown[0].summary}" if shown else ""


def grade_command(entry: Entry) -> str:
    """Command that judges the run again from its files."""
    hardware = ["--hw", entry.hardware] if entry.hardware else []
    return shlex.join(["qwen-harness", "grade", str(entry.run_dir), *hardware])


def environment_differences(entry: Entry) -> list[tuple[str, str, str]]:
    """Rows whose value is not the baseline's: (field, here, baseline)."""
    baseline = entry.grading.get("baseline") or {}
    there, info = baseline.get("environment") or {}, entry.record.info
    if not there or info is None:
        return []
    here, there = _flat(info.environment), _flat(there)
    names = sorted(set(here) | set(there))
    return [
        (name, here.get(name, "–"), there.get(name, "–"))
        for name in names
        if here.get(name) != there.get(name)
    ]


def layout_text(entry: Entry) -> str:
    """Layout in the project's order, sizes of one left out."""
    info = entry.record.info
    if info is None:
        return "–"
    parts = [
        f"{axis}{info.layout[axis]}"
        for axis in ("tp", "pp", "vpp", "cp", "ep", "dp")
        if info.layout.get(axis, 1) > 1
    ]
    return f"{info.world_size} × " + (" ".join(parts) or "dp1")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat


def _facts(entry: Entry, t: Words) -> Iterator[tuple[str, str]]:
    info = entry.record.info
    yield t["run"], entry.run_dir.name
    if entry.hardware:
        yield t["hardware"], entry.hardware
    if info is None:
        yield t["outcome"], f"{entry.record.framework} · {len(entry.record.series)}"
        return
    yield t["outcome"], f"{info.outcome.status} · {info.outcome.iteration}"
    yield t["layout"], layout_text(entry)
    device = info.hardware.get("device_name") or info.hardware.get("cpu_model")
    if device:
        yield t["model"], f"{info.family} · {_parameters(info.num_parameters.get('total', 0))}"
        yield t["host"], str(device)
    if info.environment.get("kernels"):
        yield t["kernels"], str(info.environment["kernels"])
    counts = info.sample_counts
    skipped = counts.get("skipped", 0)
    yield (
        t["samples_seen"],
        f"{counts.get('consumed', 0):,}" + (f" · {t['skipped']} {skipped}" if skipped else ""),
    )


def _effect(gate: GateResult) -> Row:
    effect, interval = gate.effect or 0.0, gate.interval
    numbers = f"{round(effect, 4) + 0.0:+.2%}"  # + 0.0: no "-0.00%"
    if interval:
        numbers += f" [{interval[0]:+.2%}, {interval[1]:+.2%}]"
    if gate.minimum_detectable_change is not None:
        numbers += f" · MDC {gate.minimum_detectable_change:.2%}"
    return {
        "gate": gate.gate, "status": gate.status, "tone": TONE_OF_STATUS[gate.status], "numbers": numbers,
        "bar": Markup(effect_bar(effect, interval, gate.margin, title=f"{gate.gate} {numbers}")),
    }  # fmt: skip


def _gate(gate: GateResult) -> Row:
    change = gate.minimum_detectable_change
    return {
        "gate": gate.gate, "status": gate.status, "tone": TONE_OF_STATUS[gate.status], "blocks": gate.blocks,
        "summary": gate.summary, "mdc": "–" if change is None else f"{change:.2%}",
    }  # fmt: skip


def _loss_charts(entry: Entry, t: Words) -> list[Markup]:
    series = entry.record.series
    if not _has(series, "lm_loss") or series.empty:
        return []
    x, loss = _column(series, "lm_loss")
    lines = [Line(x=x, y=loss, style="run", label=t["this_run"], is_measured=True)]
    reference, bands = entry.grading.get("reference"), []
    if reference:
        iterations = [float(value) for value in reference["iteration"]]
        lines.insert(
            0, Line(x=iterations, y=_floats(reference["mean"]), style="base", label=t["baseline_mean"])
        )
        bands.append(
            Band(
                x=iterations,
                low=_floats(reference["low"]),
                high=_floats(reference["high"]),
                label=t["baseline_band"],
            )
        )
    if len(loss) >= 2 * SMOOTHING:
        lines.append(Line(x=x, y=smooth(loss), style="mean", label=t["this_run_mean"]))
    if _has(series, "eval_lm_loss"):
        points = [
            point for point in zip(*_column(series, "eval_lm_loss"), strict=True) if math.isfinite(point[1])
        ]
        held_out = [list(axis) for axis in zip(*points, strict=True)]
        lines.append(Line(x=held_out[0], y=held_out[1], style="control", label=t["eval_loss"]))
    shades = _judged_window(entry, t)
    charts = [
        line_chart(
            lines,
            bands=bands,
            shades=shades,
            title=t["loss_chart"],
            x_label=t["iteration"],
            y_label="lm_loss",
        )
    ]
    difference = _difference(dict(zip(x, loss, strict=True)), reference) if reference else {}
    if len(difference) > 1:
        charts.append(_difference_chart(entry, difference, shades, t))
    return [Markup(chart) for chart in charts]


def _difference_chart(entry: Entry, difference: dict[float, float], shades: list[Shade], t: Words) -> str:
    x, y = list(difference), list(difference.values())
    gate = entry.verdict.gate("C3") if entry.verdict else None
    margin = gate.margin if gate else None
    return line_chart(
        [
            Line(x=x, y=y, style="run", label=t["difference"]),
            Line(x=x, y=smooth(y), style="mean", label=t["running_mean"]),
        ],
        levels=[Level(y=math.log1p(bound), label=f"{bound:+.1%}") for bound in margin or ()],
        shades=shades, title=t["difference_chart"], x_label=t["iteration"], y_label="ln", percent=True,
    )  # fmt: skip


def _difference(loss: dict[float, float], reference: dict[str, Any]) -> dict[float, float]:
    """ln(loss / baseline) at the iterations both have."""
    baseline = dict(zip(map(float, reference["iteration"]), _floats(reference["mean"]), strict=True))
    return {
        iteration: math.log(value / baseline[iteration])
        for iteration, value in loss.items()
        if iteration in baseline and value > 0 and baseline[iteration] > 0 and math.isfinite(value)
    }


def _judged_window(entry: Entry, t: Words) -> list[Shade]:
    gate = entry.verdict.gate("C3") if entry.verdict else None
    window = gate.details.get("window") if gate else None
    if not (isinstance(window, list | tuple) and len(window) == 2):
        return []
    return [Shade(start=float(window[0]), end=float(window[1]), label=t["judged"])]


def _speed_charts(entry: Entry, t: Words, speed: Throughput) -> list[Markup]:
    x, times = _column(entry.record.series, "step_time_ms")
    steady, _ = steady_part(entry.record.series)
    judged = values(steady, "step_time_ms")
    # the first step compiles and allocates: drawn as it is, it would flatten all others
    ceiling = 1.6 * float(np.quantile(judged, 0.99))
    drawn = [min(value, ceiling) if math.isfinite(value) else value for value in times]
    shades = [Shade(start=x[0], end=x[speed.discarded - 1], label=t["discarded"])] if speed.discarded else []
    chart = line_chart(
        [Line(x=x, y=drawn, style="run strong", label=t["this_run"], is_measured=True)],
        shades=shades, levels=[Level(y=speed.step_time_ms, label=_milliseconds(speed.step_time_ms))],
        title=t["step_chart"], x_label=t["iteration"], y_label="ms",
    )  # fmt: skip
    spread = histogram(
        judged.tolist(), title=t["step_histogram"], x_label="ms",
        marks=[(speed.step_time_ms, t["median"])],
    )  # fmt: skip
    return [Markup(chart), Markup(spread)]


def _speed_rows(speed: Throughput, t: Words) -> Iterator[tuple[str, str, str]]:
    note = t["steady_note"].format(num_steps=speed.num_steps, discarded=speed.discarded)
    yield t["step_time"], _milliseconds(speed.step_time_ms), note
    yield t["p95"], _milliseconds(speed.step_time_p95_ms), ""
    rows = (
        ("padded", speed.padded_tokens_per_second, "{:,.0f}"),
        ("real", speed.real_tokens_per_second, "{:,.0f}"),
        ("supervised", speed.supervised_tokens_per_second, "{:,.0f}"),
        ("samples", speed.samples_per_second, "{:,.2f}"),
        ("images", speed.images_per_second, "{:,.2f}"),
        ("pad_fraction", speed.pad_fraction, "{:.1%}"),
        ("vision_fraction", speed.vision_fraction, "{:.1%}"),
        ("data_share", speed.data_share, "{:.1%}"),
        ("megatron_tflops", speed.megatron_tflops, "{:,.4g}"),
        ("model_tflops", speed.model_tflops, "{:,.4g}"),
        ("mfu", speed.mfu, "{:.1%}"),
        ("ceiling_share", speed.ceiling_share, "{:.1%}"),
        ("sustained_share", speed.sustained_share, "{:.1%}"),
        ("peak_memory", speed.peak_memory_gib, "{:,.2f} GiB"),
    )
    for key, value, form in rows:
        if value is not None:
            yield t[key], form.format(value), t.get(f"{key}_note", "")


def smooth(y: list[float], window: int = SMOOTHING) -> list[float]:
    """Centred moving average; NaN at the ends."""
    if len(y) < window:
        return [math.nan] * len(y)
    ends = [math.nan] * (window // 2)
    return [*ends, *np.convolve(y, np.full(window, 1 / window), mode="valid").tolist(), *ends][: len(y)]


def _column(series: pd.DataFrame, name: str) -> tuple[list[float], list[float]]:
    """Iterations and one column's values."""
    return [float(value) for value in series.index], values(series, name).tolist()


def _floats(values: list[Any]) -> list[float]:
    return [float(value) for value in values]


def _has(series: pd.DataFrame, column: str) -> bool:
    return bool(np.isfinite(values(series, column)).any())


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _parameters(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count) if count else "–"
