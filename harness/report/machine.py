# SPDX-License-Identifier: Apache-2.0
"""The machine of one run, as the templates print it: sentinel rates, a row and a strip for each device."""

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from harness.records.machine import ALL_REDUCE, MATMUL, DeviceTelemetry, MachineFacts
from harness.report.collect import Entry
from harness.report.plots import Band, Level, Line, line_chart
from models.contract.sentinel import MOMENTS

Words = dict[str, str]
Row = dict[str, Any]
STRIPS = (("sm_clock_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "°C"))


def machine_view(entry: Entry, t: Words) -> Row | None:
    """None for a run whose machine nobody watched."""
    facts = entry.record.machine
    if not facts:
        return None
    baseline = (entry.grading.get("baseline") or {}).get("machine") or {}
    return {
        "rates": list(_rates(facts, baseline, t)),
        "devices": [_device(device) for device in facts.devices],
        "charts": [Markup(chart) for chart in _charts(facts.devices, t)],
    }


def _rates(facts: MachineFacts, baseline: dict[str, float], t: Words) -> Iterator[list[str]]:
    """Label with unit, before, after, baseline."""
    found = [facts.sentinels.get(when) for when in MOMENTS]
    products = [sentinel.slowest_tflops if sentinel else None for sentinel in found]
    reduces = [sentinel.all_reduce_gb_per_s if sentinel else None for sentinel in found]
    for label, rates, key in (
        (f"{t['matmul']}, TFLOP/s", products, MATMUL),
        (f"{t['all_reduce']}, GB/s", reduces, ALL_REDUCE),
    ):
        if any(rate is not None for rate in rates):
            yield [label, *map(_text, rates), _text(baseline.get(key))]


def _device(device: DeviceTelemetry) -> Row:
    held = ", ".join(f"{name} {share:.1%}" for name, share in device.held_down.items())
    others = max(device.processes_before, device.foreign_processes)
    return {
        "name": device.name,
        "clock": f"{_text(device.median('sm_clock_mhz'))} / {_text(device.max_sm_clock_mhz)}",
        "power": f"{_text(device.median('power_w'))} / {_text(device.power_limit_w)}",
        "temperature": _text(device.largest("temperature_c")),
        "utilization": "–" if math.isnan(share := device.median("utilization")) else f"{share:.0%}",
        "held_down": held or "–",
        "throttled": f"{device.throttled:.1%}",
        "others": str(others) if others else "–",
    }


def _charts(devices: tuple[DeviceTelemetry, ...], t: Words) -> Iterator[str]:
    """A strip for each quantity: one device's curve, or the range of several by time."""
    seen = [device for device in devices if device.num_samples > 1]
    for key, unit in STRIPS:
        curves = [
            (device.times_s, device.series[key])
            for device in seen
            if any(map(math.isfinite, device.series[key]))
        ]
        if not curves:
            continue
        x = curves[0][0]
        # Devices of one node are sampled together, and other nodes as often.
        columns = list(zip(*(y for _, y in curves), strict=False))
        bands = [
            Band(x=x[: len(columns)], low=[min(column) for column in columns],
                 high=[max(column) for column in columns], label=t["devices_range"])
        ] if len(curves) > 1 else []  # fmt: skip
        mean = [sum(column) / len(column) for column in columns]
        largest = seen[0].max_sm_clock_mhz if key == "sm_clock_mhz" else math.nan
        yield line_chart(
            [Line(x=x[: len(mean)], y=mean, style="run strong", label=t["devices_mean"])],
            bands=bands,
            levels=[Level(y=largest, label=f"{largest:.0f}")] if math.isfinite(largest) else [],
            title=f"{t[key]}, {unit}", x_label=t["seconds"], y_label=unit,
        )  # fmt: skip


def _text(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.4g}"
