# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.records import load_record
from harness.report.build import build_report, find_controls
from harness.report.ci import announce, github_annotations
from harness.report.collect import collect, read_tests
from harness.report.numbers import end_loss, throughput
from harness.report.plots import Level, Line, effect_bar, line_chart, thin, ticks
from harness.report.strings import LANGUAGES, texts
from harness.verdict import GateResult, Verdict
from models.contract.errors import RunError
from models.contract.record import RunInfo
from suites.detection.synthetic import Row, SyntheticRun, write_synthetic_run

PASS = Verdict(
    name="PASS",
    gates=(
        GateResult(
            gate="C3", status="pass", blocks=True, summary="equal", effect=0.01, interval=(0.005, 0.015),
            margin=(-0.05, 0.05), minimum_detectable_change=0.004, details={"window": [451, 500]},
        ),
    ),
    baseline_id="abc",
    match_level="exact",
)  # fmt: skip
REGRESSION = Verdict(
    name="REGRESSION",
    gates=(GateResult(gate="C1", status="fail", blocks=True, summary="first loss is +8% | off"),),
)


class Elements(HTMLParser):
    """Start tags with their attributes, and a check that tags close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "line", "rect", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def write_run(folder: Path, verdict: Verdict | None, **grading: object) -> Path:
    write_synthetic_run(folder, SyntheticRun())
    if verdict is not None:
        (folder / "verdict.json").write_text(json.dumps(verdict.to_dict()))
    if grading:
        (folder / "grading.json").write_text(json.dumps(grading))
    return folder


def parse(file: Path) -> Elements:
    elements = Elements()
    elements.feed(file.read_text(encoding="utf-8"))
    assert elements.open == []
    return elements


def test_report_stands_alone_and_is_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", PASS, case="convergence/a@cpu", hardware="cpu")
    file = build_report([tmp_path / "runs"], tmp_path / "out")
    for name in ("report.html", "report.zh-CN.html"):
        elements = parse(tmp_path / "out" / name)
        assert not [tag for tag, _ in elements.found if tag in ("script", "link", "iframe")]
        sources = [
            value for _, attributes in elements.found for key, value in attributes.items() if key == "src"
        ]
        assert all(str(value).startswith("data:") for value in sources)
        links = [attributes["href"] for tag, attributes in elements.found if tag == "a"]
        assert all(
            str(link).startswith("#") or link in ("report.html", "report.zh-CN.html") for link in links
        )
    text = file.read_text(encoding="utf-8")
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_report_shows_the_worst_verdict_first(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", PASS)
    write_run(tmp_path / "runs" / "b", REGRESSION)
    file = build_report([tmp_path / "runs"], tmp_path / "out")
    banner = re.search(r'<div class="banner (\w+)"><strong>(\w+)</strong>', file.read_text(encoding="utf-8"))
    assert banner is not None
    assert banner.groups() == ("bad", "REGRESSION")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overall"] == "REGRESSION"
    assert "first loss is +8% \\| off" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("verdicts", "expected"), [([PASS], "PASS"), ([PASS, None], "NOT_GRADED"), ([None], "NOT_GRADED")]
)
def test_report_never_calls_an_ungraded_run_a_pass(
    verdicts: list[Verdict | None], expected: str, tmp_path: Path
) -> None:
    for number, verdict in enumerate(verdicts):
        write_run(tmp_path / "runs" / str(number), verdict)
    build_report([tmp_path / "runs"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overall"] == expected


def test_report_is_built_from_a_killed_session(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", PASS)
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    rows = [
        {"$report_type": "TestReport", "nodeid": "t::a", "when": "call", "outcome": "failed", "duration": 1.0,
         "longrepr": "REGRESSION: a\n  more"},
        {"$report_type": "TestReport", "nodeid": "t::b", "when": "setup", "outcome": "passed", "duration": 0.5},
    ]  # fmt: skip
    log = "".join(json.dumps(row) + "\n" for row in rows) + '{"$report_type": "TestRep'
    (tmp_path / "runs" / "tests.jsonl").write_text(log)
    found = {test["nodeid"]: test for test in read_tests(tmp_path / "runs" / "tests.jsonl")}
    assert (found["t::a"]["outcome"], found["t::a"]["message"]) == ("failed", "REGRESSION: a")
    assert found["t::b"]["outcome"] == "killed"
    build_report([tmp_path / "runs"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overall"] == "FAILED"


def test_report_draws_a_run_of_nothing_but_nan(tmp_path: Path) -> None:
    def spoil(rows: list[Row]) -> list[Row]:
        return [{**row, "lm_loss": "nan"} for row in rows]

    write_synthetic_run(tmp_path / "runs" / "a", SyntheticRun(), change_rows=spoil)
    parse(build_report([tmp_path / "runs"], tmp_path / "out"))


def test_report_escapes_what_runs_say(tmp_path: Path) -> None:
    evil = Verdict(name="INVALID", notes=("<script>alert(1)</script>",))
    write_run(tmp_path / "runs" / "a", evil, case="<b>case</b>", hardware="cpu")
    elements = parse(build_report([tmp_path / "runs"], tmp_path / "out"))
    assert not [tag for tag, _ in elements.found if tag in ("script",)]


def test_collect_names_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory found"):
        collect([tmp_path])
    with pytest.raises(RunError, match="does not exist"):
        collect([tmp_path / "typo"])


def test_collect_leaves_out_attempts_that_were_set_aside(tmp_path: Path) -> None:
    write_run(tmp_path / "a", PASS)
    write_run(tmp_path / "a" / "attempt-1", None)
    assert [entry.run_dir.name for entry in collect([tmp_path]).entries] == ["a"]


def test_find_controls_pairs_runs_that_differ_in_blanking_alone(tmp_path: Path) -> None:
    for name in ("seen", "blank"):
        write_run(tmp_path / name, None)
    info = json.loads((tmp_path / "blank" / "run.json").read_text())
    info["recipe"]["data"]["blank_images"] = True
    info["recipe"]["name"] = "control"
    (tmp_path / "blank" / "run.json").write_text(json.dumps(info))
    ((run, control),) = find_controls(collect([tmp_path]).entries)
    assert (run.run_dir.name, control.run_dir.name) == ("seen", "blank")
    info["recipe"]["train"]["seed"] += 1
    (tmp_path / "blank" / "run.json").write_text(json.dumps(info))
    assert find_controls(collect([tmp_path]).entries) == []


def test_throughput_rates_follow_from_their_definitions(tmp_path: Path) -> None:
    def fix(rows: list[Row]) -> list[Row]:
        return [
            {**row, "step_time_ms": 500.0, "num_padded_tokens": 4000, "num_real_tokens": 3000,
             "num_supervised_tokens": 600, "num_vision_tokens": 1500, "num_images": 8,
             "megatron_flops": 4e12, "model_flops": 2e12}
            for row in rows
        ]  # fmt: skip

    record = load_record(write_synthetic_run(tmp_path / "a", SyntheticRun(), change_rows=fix))
    rates = throughput(record.series, world_size=2, hardware="h20")
    assert rates is not None
    assert (rates.padded_tokens_per_second, rates.real_tokens_per_second) == (4000.0, 3000.0)
    assert (rates.supervised_tokens_per_second, rates.images_per_second) == (600.0, 8.0)
    assert (rates.pad_fraction, rates.vision_fraction) == (0.25, 0.5)
    assert (rates.megatron_tflops, rates.model_tflops) == pytest.approx((4.0, 2.0))
    assert rates.mfu == pytest.approx(2.0 / 148.0)
    assert rates.discarded == 50
    unknown = throughput(record.series, world_size=2, hardware=None)
    assert unknown is not None
    assert unknown.mfu is None


def test_end_loss_of_nan_stays_nan(tmp_path: Path) -> None:
    def spoil(rows: list[Row]) -> list[Row]:
        return [*rows[:-1], {**rows[-1], "lm_loss": "nan"}]

    record = load_record(write_synthetic_run(tmp_path / "a", SyntheticRun(), change_rows=spoil))
    assert math.isnan(end_loss(record.series))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1.0, 500.0, [100.0, 200.0, 300.0, 400.0, 500.0])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high"),
    [(12.01, 12.35), (1289.0, 1312.0), (1290.1, 1291.4), (1e5, 2e5), (1e-4, 3e-4), (-0.5, 0.5)],
)
def test_labels_of_an_axis_say_what_its_ticks_are(low: float, high: float) -> None:
    line = Line(x=[0.0, 1.0], y=[low, high], style="run", label="")
    chart = line_chart([line], title="t", x_label="x", y_label="y")
    shown = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', str(chart).split("<svg")[1])
    places = [float(text.replace(",", "")) for text in shown]
    steps = [after - before for before, after in itertools.pairwise(places)]
    assert steps, shown
    assert steps == pytest.approx([steps[0]] * len(steps)), shown
    assert steps[0] > 0
    assert low <= places[1] < high


def test_thin_keeps_spikes_and_gaps() -> None:
    y = [1.0] * 10_000
    y[4321], y[7000] = 99.0, math.nan
    points = thin(list(range(10_000)), y, columns=100)
    assert len(points) < 310
    assert max(value for _, value in points if math.isfinite(value)) == 99.0
    assert any(math.isnan(value) for _, value in points)


def test_charts_survive_values_that_are_not_finite() -> None:
    assert "<svg" in line_chart(
        [Line(x=[1.0], y=[math.nan], style="run", label="a")], title="t", x_label="", y_label=""
    )
    assert "nan" not in effect_bar(math.nan, (-math.inf, math.inf), (-0.05, 0.05), title="t")


def test_texts_have_every_word_in_both_languages() -> None:
    english, chinese = (texts(language) for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    assert all(english.values())
    assert all(chinese.values())


def test_github_annotations_escape_and_grade_levels() -> None:
    line, *rest = github_annotations([("a,b", REGRESSION), ("c", PASS)])
    assert line == "::error title=REGRESSION a%2Cb::C1: first loss is +8%25 | off"
    assert rest == []


def test_announce_appends_to_the_step_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.md").write_text("# title\n")
    summary = tmp_path / "summary"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITLAB_CI", raising=False)
    announce(tmp_path, [])
    assert summary.read_text() == "before\n# title\n"


def test_single_point_is_drawn() -> None:
    alone = line_chart(
        [Line(x=[5.0], y=[1.0], style="control", label="held-out")], title="t", x_label="x", y_label="y"
    )
    assert alone.count('<circle class="control"') == 2  # wide and narrow
    many = line_chart(
        [Line(x=list(range(50)), y=[1.0] * 50, style="run", label="a")], title="t", x_label="x", y_label="y"
    )
    assert "<circle" not in many


@pytest.mark.parametrize("reach", [0.04, 1.5], ids=["far-apart", "close"])
def test_labels_of_margins_are_not_written_over_each_other(reach: float) -> None:
    chart = line_chart(
        [Line(x=[0.0, 1.0], y=[-reach, reach], style="run", label="")],
        levels=[Level(y=-0.05, label="-5.0%"), Level(y=0.05, label="+5.0%")],
        title="t", x_label="x", y_label="y",
    )  # fmt: skip
    for drawing in str(chart).split("<svg")[1:]:
        low, high = (
            float(re.findall(rf'y="([\d.]+)" text-anchor="end">{re.escape(label)}<', drawing)[0])
            for label in ("-5.0%", "+5.0%")
        )
        assert low - high > 10


def test_margin_that_is_open_below_does_not_hide_the_effect() -> None:
    bar = effect_bar(0.02, None, (-1.0, 0.05), title="memory")
    assert "-100" not in bar
    centres = [float(value) for value in re.findall(r'cx="([\d.]+)"', bar)]
    zeros = [float(value) for value in re.findall(r'class="grid" x1="([\d.]+)"', bar)]
    # +2% against a margin of +5% stands a quarter of the half width away from zero; of -100% it would be 3 pixels
    assert all(centre - zero > 30 for centre, zero in zip(centres, zeros, strict=True))


def test_scaling_is_drawn_where_runs_share_the_work_a_device(tmp_path: Path) -> None:
    def on(num_devices: int, factor: float) -> Path:
        def change_info(info: RunInfo) -> RunInfo:
            recipe = json.loads(json.dumps(info.recipe))
            recipe["num_processes"] = num_devices
            recipe["train"]["global_batch_size"] *= num_devices
            return info.model_copy(update={"recipe": recipe, "world_size": num_devices})

        def change_rows(rows: list[Row]) -> list[Row]:
            counted = ("num_padded_tokens", "num_real_tokens", "global_batch_size")
            return [{**row, **{name: row[name] * num_devices * factor for name in counted}} for row in rows]

        folder = tmp_path / str(num_devices)
        run = SyntheticRun(train_iters=60)
        return write_synthetic_run(folder, run, change_rows=change_rows, change_info=change_info)

    build_report([on(1, 1.0), on(2, 0.98), on(4, 0.9)], tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert texts("en")["scaling"] in html
    assert re.findall(r'badge small (\w+)">(\d+\.\d%)', html) == [
        ("good", "100.0%"), ("good", "98.0%"), ("bad", "90.0%"),
    ]  # fmt: skip
    assert "| synthetic | 4 |" in (tmp_path / "report" / "report.md").read_text()
    build_report([tmp_path / "1"], tmp_path / "alone")
    assert texts("en")["scaling"] not in (tmp_path / "alone" / "report.html").read_text()
