# SPDX-License-Identifier: Apache-2.0
"""Reader of text logs: Megatron-LM, Pai-Megatron-Patch, MindSpeed-MM and Megatron-Bridge.

All four print Megatron's line, ``iteration N/ T | key: value | …``. It is read by key, never by position, so that
fields that come and go between versions do not matter. Numbers may be ``nan`` and ``inf``.
"""

import codecs
import itertools
import re
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.records.record import (
    MAX_ITERATION,
    REPORTED_TFLOPS,
    REPORTED_TOKENS,
    TIMESTAMP,
    Rows,
    RunRecord,
    brief,
)

COLUMN_OF_KEY = {
    "consumed samples": "consumed_train_samples",
    "elapsed time per iteration (ms)": "step_time_ms",
    "throughput per gpu (tflop/s/gpu)": REPORTED_TFLOPS,
    "tokens/sec/gpu": REPORTED_TOKENS,
    "learning rate": "learning_rate",
    "global batch size": "global_batch_size",
    "lm loss": "lm_loss",
    "loss": "lm_loss",
    "loss scale": "loss_scale",
    "grad norm": "grad_norm",
    "number of skipped iterations": "num_skipped_iterations",
    "number of nan iterations": "num_nan_iterations",
}
"""Megatron's printed keys, lower case. `loss` is MindSpeed-MM's spelling. Other keys become ``extra.<key>``."""
REQUIRED = ("consumed_train_samples", "step_time_ms", "lm_loss", "num_nan_iterations")
"""A whole line has all of these; the last of them ends it."""
MINDSPEED_KEYS = frozenset({"tokens per sample"})

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_HEADER = re.compile(
    r"(?:\[(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)\]\s*)?iteration\s+(?P<n>\d+)\s*/\s*(?P<t>\d+)\s*\|"
)
_NUMBER = re.compile(
    r"^[+-]?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|nan|inf|infinity)$", re.IGNORECASE
)
_BRIDGE = re.compile(
    r"Step Time\s*:\s*(?P<seconds>\S+?)s\s+GPU utilization:\s*(?P<tflops>[^\sM]+)\s*MODEL_TFLOP/s/GPU"
)
_MEMORY = re.compile(
    r"\[Rank (?P<rank>\d+)\].*memory \(MB\) \| allocated: (?P<allocated>\S+) \| max allocated: (?P<peak>[\d.]+)"
)
_GZIP = b"\x1f\x8b"
_MEBIBYTE = 2**20
_MAX_GAP_SECONDS = 1800.0


def read_text_log(path: Path) -> RunRecord:
    """Read a log of any of the four stacks. A file without one iteration line gives a record with a problem."""
    rows, state = Rows(), _State()
    text = _text(path.read_bytes(), state)
    for number, line in enumerate(text.splitlines(), start=1):
        _read_line(_ANSI.sub("", line), f"line {number}", rows, state)
    problems = state.problems + rows.order_problems() + _clock_problems(rows)
    if not rows.rows:
        problems.append("no_iterations: no line of the form 'iteration N/ T | …' in the file")
    if len(state.totals) > 1:
        problems.append(f"several_runs: planned iterations change inside the file: {sorted(state.totals)}")
    series, known = rows.series(), rows.known()
    if state.peaks:
        series["peak_memory_bytes"] = max(state.peaks.values()) * _MEBIBYTE
        known |= {"peak_memory_bytes"}
    return RunRecord(
        series=series,
        info=None,
        source=str(path),
        framework=_framework(rows, state),
        problems=brief(problems),
        known=known,
        planned_iterations=max(state.totals, default=None),
        log_interval=_log_interval(list(series.index)),
    )


class _State:
    """What is carried from line to line."""

    def __init__(self) -> None:
        self.totals: set[int] = set()
        self.problems: list[str] = []
        self.bridge: dict[str, float] = {}
        self.is_bridge = False
        self.peaks: dict[int, float] = {}


def _read_line(line: str, place: str, rows: Rows, state: _State) -> None:
    headers = list(_HEADER.finditer(line))
    if not headers:
        _read_other(line, state)
        return
    if len(headers) > 1:
        state.problems.append(
            f"interleaved: {place} holds {len(headers)} iteration lines: several ranks write at once"
        )
    ends = [header.start() for header in headers[1:]] + [len(line)]
    for header, end in zip(headers, ends, strict=True):
        row, problems = _fields(line[header.end() : end], place)
        iteration, total = _count(header["n"]), _count(header["t"])
        if iteration is None or total is None:
            state.problems.append(f"bad_iteration: {place}: {header['n']:.20} of {header['t']:.20}")
            continue
        row["iteration"] = iteration
        if header["time"]:
            row |= _time(header["time"], place, state)
        row |= {key: value for key, value in state.bridge.items() if key not in row}
        state.bridge = {}
        state.totals.add(total)
        state.problems += problems
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            state.problems.append(
                f"torn_line: {place}, iteration {row['iteration']}: no {', '.join(missing)}"
            )
        rows.add(row, place)


def _text(data: bytes, state: _State) -> str:
    """The text of a file that may be compressed, or written by a shell that speaks UTF-16."""
    if data.startswith(_GZIP):
        reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            data = reader.decompress(data)
        except zlib.error as error:
            state.problems.append(f"torn_file: the compressed log is damaged: {error}")
            return ""
        if not reader.eof:
            state.problems.append("torn_file: the compressed log ends in the middle")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    return data.decode("utf-8", errors="replace")


def _count(digits: str) -> int | None:
    """An iteration, or None for more digits than one can have."""
    number = int(digits) if len(digits) <= 18 else MAX_ITERATION + 1
    return number if number <= MAX_ITERATION else None


def _time(text: str, place: str, state: _State) -> dict[str, Any]:
    try:
        return {TIMESTAMP: datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()}
    except ValueError:
        state.problems.append(f"bad_time: {place}: {text}")
        return {}


def _fields(text: str, place: str) -> tuple[dict[str, Any], list[str]]:
    """The ``key: value`` pairs of one line, as columns."""
    row: dict[str, Any] = {}
    problems: list[str] = []
    for piece in text.split("|"):
        key, colon, value = piece.rpartition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon or not key:
            continue
        if not _NUMBER.match(value):
            problems.append(f"torn_line: {place}: '{key}' has the value {value[:30]!r}")
            continue
        column = COLUMN_OF_KEY.get(key, f"extra.{key}")
        if column in row and row[column] != float(value):
            problems.append(f"interleaved: {place}: '{key}' is there twice with different values")
        row[column] = float(value)
    return row, problems


def _read_other(line: str, state: _State) -> None:
    """Lines beside the iteration line: Bridge's step time, Megatron's memory report."""
    if match := _BRIDGE.search(line):
        state.is_bridge = True
        if _NUMBER.match(match["tflops"]):
            state.bridge = {REPORTED_TFLOPS: float(match["tflops"])}
    if match := _MEMORY.search(line):
        state.peaks[int(match["rank"])] = float(match["peak"])


def _framework(rows: Rows, state: _State) -> str:
    if not rows.rows:
        return "unknown"
    keys = {key.removeprefix("extra.") for row in rows.rows for key in row}
    if keys & MINDSPEED_KEYS:
        return "mindspeed_mm"
    return "megatron_bridge" if state.is_bridge else "megatron_lm"


def _clock_problems(rows: Rows) -> list[str]:
    """Timestamps that run backwards, or jump further than the steps between them can explain."""
    problems: list[str] = []
    stamped = [row for row in rows.rows if TIMESTAMP in row]
    for before, after in itertools.pairwise(stamped):
        gap = after[TIMESTAMP] - before[TIMESTAMP]
        steps = after["iteration"] - before["iteration"]
        where = f"between iterations {before['iteration']} and {after['iteration']}"
        if steps > 0 and gap < -1:
            problems.append(f"clock_jump: the clock runs back {-gap:.0f} s {where}")
        expected = max(steps, 0) * after.get("step_time_ms", 0.0) / 1000.0
        if gap > expected * 2 + _MAX_GAP_SECONDS:
            problems.append(f"clock_jump: {gap:.0f} s {where}, whose steps take {expected:.0f} s")
    return problems


def _log_interval(iterations: list[int]) -> int:
    """Stride of a log that prints every k-th iteration; 1 when the rows are not evenly spaced."""
    if len(iterations) < 2:
        return 1
    steps = [after - before for before, after in itertools.pairwise(iterations)]
    stride = steps[0]
    # The last row stands at the end of the run, whatever the stride.
    is_even = all(step == stride for step in steps[:-1]) and steps[-1] <= stride
    return stride if is_even and iterations[0] in {1, stride} else 1
