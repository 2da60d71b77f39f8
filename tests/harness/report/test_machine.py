# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest

from harness.report.build import JSON_FILE, build_report
from harness.report.collect import collect
from harness.report.machine import machine_view
from harness.report.strings import LANGUAGES, Language, texts
from models.contract.sentinel import MOMENTS, Sentinel, sentinel_file
from suites.detection.synthetic import SyntheticRun, write_synthetic_run
from tests.harness.report.test_report import Elements


def write_run(folder: Path, *, num_devices: int, num_samples: int = 30, **sample: Any) -> Path:
    """A run with a telemetry file and both sentinels."""
    run = write_synthetic_run(folder, SyntheticRun(train_iters=40))
    facts = {
        "name": "NVIDIA H200", "max_sm_clock_mhz": 1980, "power_limit_w": 700.0, "default_power_limit_w": 700.0,
        "processes_before": 0, "ecc_errors_before": None,
    }  # fmt: skip
    device = {
        "sm_clock_mhz": 1755, "power_w": 690.0, "temperature_c": 61, "utilization": 0.98,
        "held_down_by": ["power cap"], "foreign_processes": 0, "ecc_errors": None,
    } | sample  # fmt: skip
    rows: list[dict[str, Any]] = [{"devices": [{"index": number, **facts} for number in range(num_devices)]}]
    rows += [
        {"time_s": float(second), "is_training": True, "devices": [device] * num_devices}
        for second in range(num_samples)
    ]
    (run / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for when, rate in zip(MOMENTS, (790.0, 780.5), strict=True):
        Sentinel(
            started_at="2026-01-05T08:00:00+00:00", device_names=("NVIDIA H200",) * num_devices, dtype="bfloat16",
            matmul_size=8192, matmul_tflops=(rate,) * num_devices, matmul_best_tflops=(rate + 20,) * num_devices,
            all_reduce_bytes=2**28,
            all_reduce_gb_per_s=410.0 if num_devices > 1 else None,
        ).write(sentinel_file(run, when))  # fmt: skip
    return run


def view_of(run: Path, language: Language = "en") -> Any:
    [entry] = collect([run]).entries
    return machine_view(entry, texts(language))


def test_rates_and_devices_are_told(tmp_path: Path) -> None:
    view = view_of(write_run(tmp_path / "run", num_devices=2))
    assert view["rates"] == [
        ["Matrix product, TFLOP/s", "790", "780.5", "–"], ["All-reduce, bus bandwidth, GB/s", "410", "410", "–"],
    ]  # fmt: skip
    assert view["devices"][1] == {
        "name": "1 NVIDIA H200", "clock": "1,755 / 1,980", "power": "690 / 700", "temperature": "61",
        "utilization": "98%", "held_down": "power cap 100.0%", "throttled": "0.0%", "others": "–",
    }  # fmt: skip
    assert len(view["charts"]) == 3


def test_one_device_alone_has_no_all_reduce(tmp_path: Path) -> None:
    view = view_of(write_run(tmp_path / "run", num_devices=1))
    assert [row[0] for row in view["rates"]] == ["Matrix product, TFLOP/s"]


@pytest.mark.parametrize("num_samples", [0, 1])
def test_a_run_too_short_to_be_seen_has_no_curves(num_samples: int, tmp_path: Path) -> None:
    view = view_of(write_run(tmp_path / "run", num_devices=2, num_samples=num_samples))
    assert view["charts"] == []
    assert view["devices"][0]["name"] == "0 NVIDIA H200"


def test_what_a_device_does_not_offer_is_left_out(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("sm_clock_mhz", "power_w", "utilization", "held_down_by"))
    view = view_of(write_run(tmp_path / "run", num_devices=1, **nothing))
    assert len(view["charts"]) == 1  # the temperature
    row = view["devices"][0]
    assert (row["clock"], row["power"], row["utilization"], row["held_down"]) == (
        "– / 1,980", "– / 700", "–", "–",
    )  # fmt: skip


def test_a_run_whose_machine_nobody_watched_has_no_section(tmp_path: Path) -> None:
    assert view_of(write_synthetic_run(tmp_path / "run", SyntheticRun(train_iters=40))) is None


def test_the_report_shows_the_machine_in_both_languages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_devices=2)
    build_report([run], tmp_path / "report")
    for file, language in zip(("report.html", "report.zh-CN.html"), LANGUAGES, strict=True):
        html = (tmp_path / "report" / file).read_text()
        parser = Elements()
        parser.feed(html)
        assert parser.open == []
        assert texts(language)["machine_note"] in html
    data = json.loads((tmp_path / "report" / JSON_FILE).read_text())
    rates = data["cases"][0]["throughput"]
    assert rates["ceiling_share"] == pytest.approx(rates["model_tflops"] / 810.0)
    assert rates["sustained_share"] == pytest.approx(rates["model_tflops"] / 785.25)
