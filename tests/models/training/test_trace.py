# SPDX-License-Identifier: Apache-2.0
"""Recordings of real runs: engines and micro-batchings agree point by point, and a changed weight is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.contract.divergence import Trace, distances, first_tensor, read_trace
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training.progress import TrainOptions
from models.training.start import train
from models.training.trace import record, transformers_points
from tests.models.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def traced(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Trace]:
    def run(name: str, **sections: dict[str, Any]) -> Trace:
        train(make_recipe(**sections), site, tmp_path / name, TrainOptions(stop_after=2, trace=2))
        return read_trace(tmp_path / name, 2)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_omni"])
def test_engines_agree_at_every_point(family: str, all_families: Site, traced: Callable[..., Trace]) -> None:
    # Measured worst of up to 58 points in the second step: 6e-6, in a gradient of the vision tower.
    same: dict[str, Any] = {
        "model": {"family": family, "checkpoint": f"tiny-{family}"},
        "data": {"dataset": "scenes-audio" if family == "qwen3_omni" else "scenes", "seq_length": 256},
    }
    megatron = traced("megatron", **same)
    found = distances(megatron, traced("fsdp2", **same, train={"engine": "fsdp2"}))
    assert len(found) == len(megatron) > 50
    assert max(row.relative for row in found) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_omni"])
@pytest.mark.parametrize(
    ("num_processes", "parallel"),
    [
        pytest.param(2, {"context_parallel_size": 2}, id="cp2"),
        pytest.param(
            4,
            {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            id="cp2-tp2sp",
        ),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, id="pp2"),
    ],
)
def test_layouts_agree_at_every_point(
    num_processes: int, parallel: dict[str, Any], family: str, all_families: Site, traced: Callable[..., Trace],
    trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path,
) -> None:  # fmt: skip
    # Two pictures in a row, or pictures and sound. Of stated length: a router balances padding too.
    same: dict[str, Any] = {
        "model": {"family": family, "checkpoint": f"tiny-{family}"},
        "data": {
            "dataset": "fixed-shapes", "packing": True, "seq_length": 256,
            "fixed_shapes": {"samples": 2, "images": 2, "image_size": 224},
        },
        "train": {"micro_batch_size": 1},
    }  # fmt: skip
    if family == "qwen3_omni":
        same |= {"data": {"dataset": "scenes-audio", "seq_length": 256, "padding": "max_length"}, "train": {}}
    same["data"] |= {"padding": "max_length"}
    alone = traced("alone", **same)
    together = tmp_path / "together"
    trainer.run(
        make_recipe(num_processes, parallel=parallel, **same), together, "--stop-after", "2", "--trace", "2"
    )
    found = distances(alone, read_trace(together, 2))
    assert len(found) == len(alone) > 50
    # Measured worst: 3e-6.
    assert max(row.relative for row in found) < 2e-5


def test_a_changed_weight_is_found_where_it_is(
    traced: Callable[..., Trace], site: Site, tmp_path: Path
) -> None:
    source, changed = site.checkpoint("tiny-qwen2_5_vl"), tmp_path / "changed"
    changed.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for name in tensors:
                if name.endswith("layers.2.mlp.down_proj.weight"):
                    tensors[name][0, 0] += 1.0
            save_file(tensors, changed / file.name, metadata={"format": "pt"})
        elif file.is_file():
            (changed / file.name).write_bytes(file.read_bytes())
    sides = [traced(name, model={"checkpoint": str(path)}) for name, path in (("a", source), ("b", changed))]
    forward = first_tensor(distances(*sides), "forward", tolerance=1e-2)
    assert forward is not None
    assert forward.point == "language_model.decoder.layers.2.mlp"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.self_attn(hidden_states))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(4, 3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            hidden_states = layer(hidden_states=hidden_states)
        return self.lm_head(hidden_states)


def test_record_keeps_the_first_micro_batch_and_its_gradients() -> None:
    model, first, second = Model(), torch.ones(1, 2, 4, requires_grad=True), torch.zeros(1, 2, 4)
    with record(transformers_points(model)) as found:
        model(first).sum().backward()
        model(second).sum().backward()
    assert sorted({key.partition("|")[2] for key in found}) == [
        "language_model.decoder.layers.0", "language_model.decoder.layers.0.mlp",
        "language_model.decoder.layers.0.self_attention", "language_model.decoder.layers.1",
        "language_model.decoder.layers.1.mlp", "language_model.decoder.layers.1.self_attention",
        "language_model.output_layer",
    ]  # fmt: skip
    assert torch.equal(found["forward|language_model.decoder.layers.0"], first.detach())
    assert first.grad is not None
    assert torch.equal(found["backward|language_model.decoder.layers.0"], first.grad)
    with record(transformers_points(model)) as nothing:
        pass
    assert nothing == {}
