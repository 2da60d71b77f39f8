# SPDX-License-Identifier: Apache-2.0
"""Where two runs part: the first step by their metrics, then the first tensor of one recorded step. Torch-free.

    first_step      reads two run directories: same samples? same schedule? then loss and gradient norm
    read_trace      puts together what the ranks of a run recorded of one step, sample by sample
    first_tensor    compares two such recordings point by point, in the order of the computation

The runs may be two engines, two layouts or two commits: points have one name, and samples one key, in all of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from models.contract.errors import RunError
from models.contract.record import load_metrics

Array = npt.NDArray[np.float32]
Phase = Literal["forward", "backward"]
Trace = dict[tuple[Phase, str], dict[str, Array]]
"""Values of every point, sample by sample: [tokens or patches, width]."""

FOLDER = "trace"
EXACT_FIELDS = ("sample_digest", "learning_rate", "global_batch_size", "num_supervised_tokens")
"""Fields that must be equal: when one of them differs the runs did different things, whatever their losses."""
MEASURED_FIELDS = ("lm_loss", "grad_norm")


class TraceHeader(BaseModel):
    """What one rank's recording covers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    iteration: int
    engine: str
    dp_rank: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    is_sequence_first: bool
    """Decoder tensors are [s, b, h], not [b, s, h]."""
    is_sequence_parallel: bool
    columns: list[int]
    """Places of the row that this rank has, before tensor parallelism cuts them further."""
    row_length: int
    sample_keys: list[str]
    sample_lengths: list[int]
    sample_places: list[tuple[int, int]]
    """Row and first column of every sample."""
    vision_counts: list[int]
    """Vision tokens of every sample that this rank's tower made: context-parallel ranks share the pictures."""
    audio_counts: list[int]
    """Audio tokens of every sample; every rank makes all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDifference:
    """First step at which two runs differ, and in what."""

    iteration: int
    field: str
    first: Any
    second: Any
    relative: float | None
    """Relative distance; None for fields that must be equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDistance:
    """How far one point of two recordings is apart."""

    phase: Phase
    point: str
    relative: float
    """Largest absolute difference over the largest absolute value; infinite for another shape."""
    sample: str
    """The sample in which it is largest."""


def first_step(first: Path, second: Path, *, tolerance: float = 0.0) -> StepDifference | None:
    """First iteration at which two run directories differ by more than `tolerance` (relative); None if none does.

    Raises:
        RunError: the runs share no iteration, or metrics cannot be read.
    """
    rows = [load_metrics(folder, (*EXACT_FIELDS, *MEASURED_FIELDS)) for folder in (first, second)]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise RunError(
            "the runs share no iteration", where=f"{first} and {second}",
            got=" and ".join(_span(found) for found in rows),
            fix="compare runs that have trained the same iterations",
        )  # fmt: skip
    for iteration in shared:
        a, b = rows[0][iteration], rows[1][iteration]
        for field in (*EXACT_FIELDS, *MEASURED_FIELDS):
            distance = None if field in EXACT_FIELDS else _relative(a[field], b[field])
            if a[field] != b[field] if distance is None else not distance <= tolerance:
                return StepDifference(
                    iteration=iteration, field=field, first=a[field], second=b[field], relative=distance
                )
    return None


def trace_file(run: Path, iteration: int, rank: int) -> Path:
    """Where one rank records one step."""
    return run / FOLDER / f"iter_{iteration:07d}" / f"rank_{rank:05d}.safetensors"


def read_trace(run: Path, iteration: int) -> Trace:
    """What all ranks of a run recorded of one step.

    Raises:
        RunError: nothing was recorded.
    """
    files = sorted(trace_file(run, iteration, 0).parent.glob("rank_*.safetensors"))
    if not files:
        raise RunError(
            "this step was not recorded", where=str(run), expected=f"{FOLDER}/iter_{iteration:07d}",
            fix=f"train with --trace {iteration}",
        )  # fmt: skip
    pieces: dict[tuple[Phase, str, int], list[tuple[TraceHeader, Array]]] = {}
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            header = TraceHeader.model_validate_json(opened.metadata()["header"])
            for key in opened.keys():  # noqa: SIM118 - not a dictionary
                phase, _, point = key.partition("|")
                pieces.setdefault((phase, point, header.dp_rank), []).append((header, opened.get_tensor(key)))
    trace: Trace = {}
    for (phase, point, _), found in pieces.items():
        trace.setdefault((phase, point), {}).update(_by_sample(phase, point, found))
    return trace


def distances(first: Trace, second: Trace) -> list[PointDistance]:
    """Distance of every point that both recorded, in the order of the computation.

    Raises:
        RunError: the recordings share no point, or no sample.
    """
    shared = sorted(first.keys() & second.keys(), key=_order)
    found = []
    for key in shared:
        samples = first[key].keys() & second[key].keys()
        apart = {sample: _distance(first[key][sample], second[key][sample]) for sample in samples}
        if apart:
            worst = max(sorted(apart), key=lambda sample: apart[sample])
            found.append(PointDistance(phase=key[0], point=key[1], relative=apart[worst], sample=worst))
    if not found:
        raise RunError(
            "the recordings share no point or no sample", fix="record the same step of the same data"
        )
    return found


def first_tensor(found: list[PointDistance], phase: Phase, *, tolerance: float) -> PointDistance | None:
    """First point of a phase, in the order of the computation, that is further apart than `tolerance`."""
    return next((row for row in found if row.phase == phase and not row.relative <= tolerance), None)


def _by_sample(
    phase: Phase, point: str, pieces: list[tuple[TraceHeader, Array]]
) -> Iterator[tuple[str, Array]]:
    """Put the pieces of one data-parallel rank together and cut them into samples."""
    if point.startswith("language_model."):
        header = pieces[0][0]
        rows = _whole_rows(point, pieces)
        for key, (row, start), length in zip(
            header.sample_keys, header.sample_places, header.sample_lengths, strict=False
        ):
            yield key, rows[row, start : start + length]
        return
    # Tensor-parallel ranks have the same.
    shares = {header.cp_rank: (header, tensor) for header, tensor in pieces}
    if point.startswith("vision_model."):
        dealt = [_cut(*shares[rank], shares[rank][0].vision_counts) for rank in sorted(shares)]
        for key in pieces[0][0].sample_keys:
            found = [share[key] for share in dealt if key in share]
            if found:
                yield key, np.concatenate(found)
        return
    header, tensor = pieces[0]
    if phase == "backward":  # a rank's gradient is that of its own positions
        tensor = np.sum([share for _, share in shares.values()], axis=0)
    yield from _cut(header, tensor, header.audio_counts).items()


def _cut(header: TraceHeader, tensor: Array, counts: list[int]) -> dict[str, Array]:
    """What a tower made of each sample's media; nothing where it made none, or a blank one to be kept busy."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    found = {}
    start = 0
    for key, count in zip(header.sample_keys, counts, strict=False):
        if count:
            rows = count * (flat.shape[0] // sum(counts))
            found[key] = flat[start : start + rows]
            start += rows
    return found


def _whole_rows(point: str, pieces: list[tuple[TraceHeader, Array]]) -> Array:
    """Rows of the micro-batch from what tensor- and context-parallel ranks have of them, [b, s, width]."""
    is_vocabulary = point.endswith("output_layer")
    out: Array | None = None
    for header, piece in pieces:
        rows = piece.swapaxes(0, 1) if header.is_sequence_first else piece
        columns, width, first = np.array(header.columns), rows.shape[-1], 0
        if is_vocabulary and header.tp_size > 1:
            first = header.tp_rank * width
        elif header.is_sequence_parallel and header.tp_size > 1:
            columns = np.split(columns, header.tp_size)[header.tp_rank]
        if out is None:
            total = width * header.tp_size if is_vocabulary else width
            out = np.full((rows.shape[0], header.row_length, total), np.nan, dtype=np.float32)
        out[:, columns, first : first + width] = rows[: out.shape[0], : len(columns)]
    assert out is not None
    return out


def _order(key: tuple[Phase, str]) -> tuple[int, list[int]]:
    """Towers first, then the decoder, then the logits; the other way round for gradients."""
    phase, point = key
    layer = re.search(r"layers\.(\d+)", point)
    ends = ["layers", "merger", "deepstack_mergers", "final_layernorm", "output_layer"]
    end = next((index for index, name in enumerate(ends) if re.search(rf"\.{name}(\.|$)", point)), 0)
    part = 1 if point.endswith("self_attention") else 2 if point.endswith("mlp") else 0
    order = [int(point.startswith("language_model.")), end, int(layer[1]) if layer else 0, part]
    return (0, order) if phase == "forward" else (1, [-number for number in order])


def _distance(a: Array, b: Array) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale, gap = float(np.abs(a).max(initial=0.0)), float(np.abs(a - b).max(initial=0.0))
    return gap / scale if scale else gap


def _span(rows: dict[int, Any]) -> str:
    return f"iterations {min(rows)} to {max(rows)}" if rows else "no iteration"


def _relative(a: Any, b: Any) -> float:
    if a == b:
        return 0.0
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b))
