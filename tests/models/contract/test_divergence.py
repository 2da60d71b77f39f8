# SPDX-License-Identifier: Apache-2.0
"""The first step and the first tensor at which two runs part; each fault is planted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.contract.divergence import (
    TraceHeader,
    distances,
    first_step,
    first_tensor,
    read_trace,
    trace_file,
)
from models.contract.errors import RunError

DECODER = "language_model.decoder.layers"


def write_rows(folder: Path, **changes: dict[int, Any]) -> Path:
    folder.mkdir()
    rows = []
    for iteration in (1, 2, 3):
        row = {
            "iteration": iteration, "sample_digest": f"d{iteration}", "learning_rate": 1e-3, "global_batch_size": 4,
            "num_supervised_tokens": 10, "lm_loss": 3.0 - iteration, "grad_norm": 1.0,
        }  # fmt: skip
        row |= {field: values[iteration] for field, values in changes.items() if iteration in values}
        rows.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


def header(**changes: Any) -> TraceHeader:
    fields = {
        "iteration": 1, "engine": "megatron", "dp_rank": 0, "tp_rank": 0, "tp_size": 1, "cp_rank": 0,
        "is_sequence_first": True, "is_sequence_parallel": False, "columns": [0, 1, 2, 3], "row_length": 4,
        "sample_keys": ["x", "y"], "sample_lengths": [3, 4], "sample_places": [(0, 0), (1, 0)],
        "vision_counts": [2, 1], "audio_counts": [0, 0],
    }  # fmt: skip
    return TraceHeader.model_validate(fields | changes)


def write_trace(run: Path, *pieces: tuple[TraceHeader, dict[str, np.ndarray]]) -> Path:
    for rank, (about, tensors) in enumerate(pieces):
        path = trace_file(run, 1, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tensors.items()}
        save_file(whole, path, metadata={"header": about.model_dump_json()})
    return run


def test_first_step_is_none_for_equal_runs(tmp_path: Path) -> None:
    assert first_step(write_rows(tmp_path / "a"), write_rows(tmp_path / "b")) is None


@pytest.mark.parametrize(
    ("changes", "iteration", "field"),
    [
        ({"lm_loss": {3: 0.1}}, 3, "lm_loss"),
        ({"grad_norm": {2: "nan"}}, 2, "grad_norm"),
        ({"lm_loss": {2: 1.5}, "sample_digest": {2: "other"}}, 2, "sample_digest"),
        ({"learning_rate": {1: 2e-3}, "lm_loss": {3: 9.0}}, 1, "learning_rate"),
    ],
)
def test_first_step_names_iteration_and_cause(
    changes: dict[str, Any], iteration: int, field: str, tmp_path: Path
) -> None:
    found = first_step(write_rows(tmp_path / "a"), write_rows(tmp_path / "b", **changes), tolerance=1e-6)
    assert found is not None
    assert (found.iteration, found.field) == (iteration, field)


def test_first_step_refuses_runs_without_a_common_iteration(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="share no iteration"):
        first_step(write_rows(tmp_path / "a"), tmp_path / "empty")


def test_read_trace_cuts_samples_out_of_rows_and_patches(tmp_path: Path) -> None:
    rows = np.arange(2 * 4 * 3.0).reshape(2, 4, 3)  # [b, s, h]
    patches = np.arange(12.0).reshape(12, 1, 1)  # four patches a token
    tensors = {
        f"forward|{DECODER}.0": rows.swapaxes(0, 1),
        "backward|vision_model.layers.0": patches,
        "forward|vision_model.merger": np.arange(3.0).reshape(3, 1),
    }
    trace = read_trace(write_trace(tmp_path, (header(), tensors)), 1)
    np.testing.assert_array_equal(trace["forward", f"{DECODER}.0"]["x"], rows[0, :3])
    np.testing.assert_array_equal(trace["forward", f"{DECODER}.0"]["y"], rows[1])
    np.testing.assert_array_equal(trace["backward", "vision_model.layers.0"]["y"].ravel(), [8, 9, 10, 11])
    np.testing.assert_array_equal(trace["forward", "vision_model.merger"]["x"].ravel(), [0, 1])


def test_read_trace_joins_what_the_layout_cut(tmp_path: Path) -> None:
    rows, logits = np.arange(24.0).reshape(2, 4, 3), np.arange(64.0).reshape(2, 4, 8)
    whole = {
        f"forward|{DECODER}.0": rows.swapaxes(0, 1),
        "forward|language_model.output_layer": logits.swapaxes(0, 1),
    }
    one = read_trace(write_trace(tmp_path / "one", (header(), whole)), 1)
    sequence_parallel = [
        (
            header(tp_rank=rank, tp_size=2, is_sequence_parallel=True),
            {
                f"forward|{DECODER}.0": rows[:, 2 * rank : 2 * rank + 2].swapaxes(0, 1),
                "forward|language_model.output_layer": logits[..., 4 * rank : 4 * rank + 4].swapaxes(0, 1),
            },
        )
        for rank in (0, 1)
    ]
    context_parallel = [
        (header(columns=columns), {key: value[columns] for key, value in whole.items()})
        for columns in ([0, 3], [1, 2])
    ]
    for name, pieces in (("sp", sequence_parallel), ("cp", context_parallel)):
        other = read_trace(write_trace(tmp_path / name, *pieces), 1)
        assert {row.relative for row in distances(one, other)} == {0.0}


def test_read_trace_joins_the_towers_of_context_parallel_ranks(tmp_path: Path) -> None:
    # Pictures are dealt out, the second of x to rank 1; clips are heard by all, each has a part of the gradient.
    tokens, clips = np.arange(3.0).reshape(3, 1), np.arange(2.0).reshape(2, 1)
    counts: dict[str, Any] = {"audio_counts": [0, 2]}
    names = ("forward|vision_model.merger", "forward|audio_model.layers.0", "backward|audio_model.layers.0")
    whole = (header(**counts), dict(zip(names, (tokens, clips, clips), strict=True)))
    shares = [
        (
            header(**counts, cp_rank=rank, tp_rank=twin, tp_size=2, vision_counts=seen),
            dict(zip(names, (made, clips, clips * part), strict=True)),
        )
        for rank, seen, made, part in ((0, [1, 0], tokens[:1], 0.25), (1, [1, 1], tokens[1:], 0.75))
        for twin in (0, 1)
    ]
    idle = (
        header(**counts, cp_rank=2, vision_counts=[0, 0]),
        {names[0]: np.ones((8, 1)), names[2]: clips * 0},
    )
    one = read_trace(write_trace(tmp_path / "one", whole), 1)
    other = read_trace(write_trace(tmp_path / "cp", *shares, idle), 1)
    assert {row.point: row.relative for row in distances(one, other)} == {
        "vision_model.merger": 0.0, "audio_model.layers.0": 0.0,
    }  # fmt: skip


def test_read_trace_reads_packed_rows(tmp_path: Path) -> None:
    packed = header(row_length=7, columns=list(range(7)), sample_places=[(0, 0), (0, 3)])
    rows = np.arange(7.0).reshape(7, 1, 1)
    trace = read_trace(write_trace(tmp_path, (packed, {f"forward|{DECODER}.0": rows})), 1)
    np.testing.assert_array_equal(trace["forward", f"{DECODER}.0"]["y"].ravel(), [3, 4, 5, 6])


def test_first_tensor_follows_the_computation_forward_and_back(tmp_path: Path) -> None:
    names = [f"{DECODER}.{layer}{part}" for layer in (0, 2, 10) for part in ("", ".self_attention", ".mlp")]
    names += ["vision_model.layers.3", "vision_model.merger", "language_model.output_layer"]
    ones = {f"{phase}|{name}": np.ones((4, 2, 3)) for phase in ("forward", "backward") for name in names}
    ones |= {key: np.ones((12, 3)) for key in ones if "vision" in key}
    changed = {key: value.copy() for key, value in ones.items()}
    for key in (f"forward|{DECODER}.2.mlp", f"forward|{DECODER}.10", f"backward|{DECODER}.2.self_attention"):
        changed[key][1, 0, 0] = 1.5
    changed["backward|vision_model.merger"] *= 2
    traces = [
        read_trace(write_trace(tmp_path / name, (header(), tensors)), 1)
        for name, tensors in (("a", ones), ("b", changed))
    ]
    found = distances(*traces)
    order = [row.point for row in found if row.phase == "forward"]
    assert order == [
        "vision_model.layers.3", "vision_model.merger",
        *(f"{DECODER}.{layer}{part}" for layer in (0, 2, 10) for part in ("", ".self_attention", ".mlp")),
        "language_model.output_layer",
    ]  # fmt: skip
    assert [row.point for row in found if row.phase == "backward"] == order[::-1]
    forward, backward = (first_tensor(found, phase, tolerance=1e-6) for phase in ("forward", "backward"))
    assert forward is not None
    assert backward is not None
    assert (forward.point, forward.relative, forward.sample) == (f"{DECODER}.2.mlp", 0.5, "x")
    assert backward.point == f"{DECODER}.2.self_attention"
    assert first_tensor(distances(traces[0], traces[0]), "forward", tolerance=0.0) is None


def test_recordings_without_anything_in_common_are_refused(tmp_path: Path) -> None:
    tensors = {f"forward|{DECODER}.0": np.ones((4, 2, 3))}
    a = read_trace(write_trace(tmp_path / "a", (header(), tensors)), 1)
    b = read_trace(write_trace(tmp_path / "b", (header(sample_keys=["p", "q"]), tensors)), 1)
    with pytest.raises(RunError, match="share no point or no sample"):
        distances(a, b)
    with pytest.raises(RunError, match="was not recorded") as caught:
        read_trace(tmp_path / "a", 2)
    assert "--trace 2" in str(caught.value)
