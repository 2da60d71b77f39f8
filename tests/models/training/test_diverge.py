# SPDX-License-Identifier: Apache-2.0
"""The first step, module and tensor at which two runs part; each fault is planted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.contract.errors import RunError
from models.training.diverge import first_step, first_tensor, record_tensors


def write_rows(folder: Path, **changes: dict[int, Any]) -> Path:
    folder.mkdir()
    rows = []
    for iteration in (1, 2, 3):
        row = {
            "iteration": iteration, "sample_digest": f"d{iteration}", "learning_rate": 1e-3, "global_batch_size": 4,
            "num_supervised_tokens": 10, "lm_loss": 3.0 - iteration, "grad_norm": 1.0, "eval_lm_loss": None,
        }  # fmt: skip
        row |= {field: values[iteration] for field, values in changes.items() if iteration in values}
        rows.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


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


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def record(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    with record_tensors(model) as found:
        model(torch.ones(4, 3)).sum().backward()
    return found


def test_first_tensor_names_the_module_that_was_changed() -> None:
    reference, altered = build(), build()
    assert first_tensor(record(reference), record(altered), tolerance=0.0) is None
    with torch.no_grad():
        altered[2].weight[1, 0] += 0.5
    found = first_tensor(record(reference), record(altered), tolerance=1e-6)
    assert found is not None
    assert (found.phase, found.module) == ("forward", "2")


def test_first_tensor_sees_a_fault_of_the_backward_pass_alone() -> None:
    reference, altered = build(), build()
    altered[1].register_full_backward_hook(lambda _module, gradients, _out: (gradients[0] * 2,))
    found = first_tensor(record(reference), record(altered), tolerance=1e-6)
    assert found is not None
    assert (found.phase, found.module) == ("backward", "0")


def test_first_tensor_maps_names_and_swapped_axes() -> None:
    a = {("forward", "decoder"): torch.arange(6.0).view(3, 2, 1)}
    b = {("forward", "layers"): torch.arange(6.0).view(3, 2, 1).transpose(0, 1)}
    assert first_tensor(a, b, tolerance=0.0, names={"layers": "decoder"}.__getitem__) is None
    with pytest.raises(RunError, match="share no module"):
        first_tensor(a, b, tolerance=0.0)
