# SPDX-License-Identifier: Apache-2.0
"""Readers: what other stacks print, and what goes wrong on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.grading import grade
from harness.policy import Policy
from harness.records import RunRecord, load_record
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS
from models.contract.errors import RunError
from models.contract.record import METRICS_FILE
from suites.detection.synthetic import SyntheticRun, write_synthetic_run


def line(
    n: int, total: int = 6, *, loss: str | None = None, clock: str | None = None, extra: str = ""
) -> str:
    """One line as Megatron-LM prints it."""
    clock = clock or f"2026-01-05 08:00:{n:02d}.123456"
    return (
        f" [{clock}] iteration {n:8d}/{total:8d} | consumed samples: {n * 8:12d} | "
        f"elapsed time per iteration (ms): {1000 + n % 2}.0 | throughput per GPU (TFLOP/s/GPU): 400.0 | "
        f"learning rate: 1.000000E-05 | global batch size:     8 | lm loss: {loss or f'{3 - n / 100:.6E}'} | {extra}"
        "loss scale: 1.0 | grad norm: 1.500 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def log(tmp_path: Path, *lines: str, name: str = "train.log") -> RunRecord:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return load_record(path)


def test_megatron_lm_log(tmp_path: Path) -> None:
    record = log(
        tmp_path,
        "> building dataset",
        *[line(n, extra="load_balancing_loss: 1.0E+00 | ") for n in range(1, 7)],
    )
    assert (record.framework, record.problems, record.planned_iterations) == ("megatron_lm", (), 6)
    assert record.values("lm_loss").tolist() == pytest.approx([2.99, 2.98, 2.97, 2.96, 2.95, 2.94])
    assert record.values(REPORTED_TFLOPS).tolist() == [400.0] * 6
    assert record.values("extra.load_balancing_loss").tolist() == [1.0] * 6
    assert record.values("consumed_train_samples").tolist() == [8, 16, 24, 32, 40, 48]
    assert record.has("grad_norm")
    assert not record.has("num_real_tokens")
    assert np.isnan(record.values("num_real_tokens")).all()
    assert record.world_size is None


def test_fields_are_read_by_key_not_by_place(tmp_path: Path) -> None:
    text = line(1, total=1)
    fields = text.split(" | ")[1:-1]
    shuffled = " | ".join([text.split(" | ")[0], *reversed(fields), text.split(" | ")[-1]])
    assert log(tmp_path, shuffled).series.equals(log(tmp_path, text, name="other").series)


def test_pai_log_with_rates(tmp_path: Path) -> None:
    record = log(tmp_path, *[line(n, extra="tokens/sec/gpu: 8123.4 | ") for n in range(1, 7)])
    assert record.values(REPORTED_TOKENS).tolist() == [8123.4] * 6


def test_mindspeed_log(tmp_path: Path) -> None:
    lines = [line(n).replace("lm loss: ", "tokens per sample: 179.0 | loss: ") for n in range(1, 7)]
    memory = "[Rank 3] (after 2 iterations) memory (MB) | allocated: 13945.67 | max allocated: 25706.38 | reserved: 1.0"
    record = log(tmp_path, lines[0], memory, *lines[1:])
    assert record.framework == "mindspeed_mm"
    assert record.values("lm_loss")[0] == pytest.approx(2.99)
    assert record.values("extra.tokens per sample")[0] == 179.0
    assert record.values("peak_memory_bytes")[0] == pytest.approx(25706.38 * 2**20)


def test_bridge_log(tmp_path: Path) -> None:
    lines = []
    for n in range(1, 7):
        text = line(n).replace(" throughput per GPU (TFLOP/s/GPU): 400.0 |", "")
        lines += [f"Step Time : 1.00s GPU utilization: {300 + n}.5MODEL_TFLOP/s/GPU", text]
    record = log(tmp_path, *lines)
    assert record.framework == "megatron_bridge"
    assert record.values(REPORTED_TFLOPS).tolist() == [301.5, 302.5, 303.5, 304.5, 305.5, 306.5]


def test_colours_are_stripped(tmp_path: Path) -> None:
    record = log(tmp_path, *[f"\x1b[32m{line(n)}\x1b[0m" for n in range(1, 7)])
    assert (record.problems, len(record.series)) == ((), 6)


def test_log_of_every_tenth_iteration(tmp_path: Path, policy: Policy) -> None:
    clocks = {n: f"2026-01-05 08:{n // 60:02d}:{n % 60:02d}" for n in range(10, 56, 5)}
    record = log(tmp_path, *[line(n, total=55, clock=clocks[n]) for n in (10, 20, 30, 40, 50, 55)])
    assert (record.log_interval, record.problems) == (10, ())
    assert grade(record, None, policy).name == "NO_BASELINE"
    cut = log(tmp_path, *[line(n, total=55, clock=clocks[n]) for n in (10, 20, 40, 50, 55)])
    assert grade(cut, None, policy).name == "INVALID"


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        pytest.param([line(1), line(2), line(2), line(3)], "duplicate_iteration", id="duplicate"),
        pytest.param([line(1), line(2), line(3), line(2)], "rewound", id="restart"),
        pytest.param([line(1), line(2)[:200], line(3)], "torn_line", id="torn"),
        pytest.param([line(1), line(2) + line(2), line(3)], "interleaved", id="ranks_on_one_line"),
        pytest.param([line(1), line(2)[:120] + line(2)], "interleaved", id="ranks_in_the_middle"),
        pytest.param([line(1), line(2, clock="2026-01-05 07:00:00")], "clock_jump", id="clock_back"),
        pytest.param([line(1), line(2, clock="2026-01-05 19:00:00")], "clock_jump", id="clock_ahead"),
        pytest.param([line(1), line(2, loss="2.x")], "torn_line", id="not_a_number"),
        pytest.param([line(1), line(2, total=7)], "several_runs", id="two_plans"),
        pytest.param(["hello"], "no_iterations", id="foreign"),
        pytest.param([""], "no_iterations", id="empty"),
        pytest.param(["\x00\x01\x02"], "no_iterations", id="binary"),
    ],
)
def test_broken_log_is_named_and_never_passes(
    lines: list[str], code: str, tmp_path: Path, policy: Policy
) -> None:
    record = log(tmp_path, *lines)
    assert code in {problem.split(":")[0] for problem in record.problems}
    for mode in ("tost", "literal", "off"):
        assert grade(record, None, policy, gate_mode=mode).name == "INVALID"


@pytest.mark.parametrize("value", ["nan", "NaN", "NAN", "inf", "-inf", "INF"])
def test_non_finite_loss_is_read_not_lost(value: str, tmp_path: Path, policy: Policy) -> None:
    record = log(tmp_path, line(1), line(2, loss=value), *[line(n) for n in range(3, 7)])
    assert record.problems == ()
    assert not np.isfinite(record.values("lm_loss")[1])
    assert grade(record, None, policy).name == "INVALID"


def test_problems_of_a_kind_are_counted_not_listed(tmp_path: Path) -> None:
    record = log(tmp_path, *[line(n, total=50)[:150] for n in range(1, 51)])
    assert len(record.problems) == 4
    assert record.problems[-1] == "torn_line: and 47 more like it"


def test_own_train_log_reads_like_its_run_directory(tmp_path: Path) -> None:
    """The text log next to a run directory is a foreign log like any other."""
    directory = write_synthetic_run(tmp_path / "run", SyntheticRun())
    (directory / "train.log").write_text("\n".join(line(n) for n in range(1, 7)))
    assert load_record(directory).framework == "qwen_harness"
    assert load_record(directory / METRICS_FILE).framework == "qwen_harness"
    assert load_record(directory / "train.log").framework == "megatron_lm"


def test_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    for step in range(1, 13):
        values = {
            "lm loss": 3.0 - step / 10,
            "lm loss vs samples": 9.0,
            "grad-norm": 1.5,
            "iteration-time": 0.25,
            "batch-size": 8.0,
        }
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writer.add_event(Event(step=step, wall_time=1e9 + step, summary=summary))
    writer.close()
    record = load_record(tmp_path)
    assert (record.framework, record.problems, len(record.series)) == ("tensorboard", (), 12)
    assert record.values("step_time_ms")[0] == pytest.approx(250.0)
    assert record.values("lm_loss")[-1] == pytest.approx(1.8)
    (file,) = tmp_path.glob("events.*")
    assert load_record(file).series.equals(record.series)
    file.write_bytes(file.read_bytes()[:-7])
    torn = load_record(tmp_path)
    assert len(torn.series) < 12 or torn.problems


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "a.png").touch())]
)
def test_nothing_to_read_is_an_error_with_a_name(make: object, tmp_path: Path) -> None:
    make(tmp_path / "run")  # type: ignore[operator]
    with pytest.raises(RunError):
        load_record(tmp_path / "run")


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 5))
def test_no_bytes_make_a_reader_fail(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, where: int
) -> None:
    """Junk anywhere in a log: a record comes back, and it is not clean unless the junk is blank or unrelated text."""
    path = tmp_path_factory.mktemp("junk") / "train.log"
    lines = [line(n).encode() for n in range(1, 7)]
    lines.insert(where, junk)
    path.write_bytes(b"\n".join(lines))
    record = load_record(path)
    assert set(record.series.index) <= set(range(1, 7)) | {0} or record.problems


@settings(max_examples=80, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(["iteration", "lm_loss", "extra", "sample_digest", "step_time_ms", "surprise"]),
)
def test_no_json_makes_a_reader_or_grader_fail(
    tmp_path_factory: pytest.TempPathFactory, value: object, key: str
) -> None:
    directory = write_synthetic_run(tmp_path_factory.mktemp("json") / "run", SyntheticRun(train_iters=12))
    lines = (directory / METRICS_FILE).read_text().splitlines()
    row = json.loads(lines[5])
    row[key] = value
    lines[5] = json.dumps(row)
    (directory / METRICS_FILE).write_text("\n".join(lines) + "\n")
    record = load_record(directory)
    verdict = grade(record, None, load_policy_once())
    assert verdict.name in {"INVALID", "NO_BASELINE"}


def load_policy_once() -> Policy:
    from harness.policy import load_policy

    return load_policy()
