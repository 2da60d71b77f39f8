# SPDX-License-Identifier: Apache-2.0
"""Towers without media: no gradient where nobody awaits one, and one of zeros where data parallelism does."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from models.common.batch import Batch
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.parity.compare import gradient_errors
from models.parity.jobs import make_jobs
from models.training.cpu import cpu_megatron
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import stop_distributed
from tests.models.training.engines import make_engine
from tests.models.training.trainer import free_port

MakeRecipe = Callable[..., Recipe]
NUM_RANKS = 2


def take_gradients(engine: MegatronEngine, batches: tuple[Batch, ...]) -> dict[str, torch.Tensor]:
    """Gradients of a step's mean loss by parameter name, before the optimizer."""
    padded = sum(batch.input_ids.numel() for batch in batches)
    denominator = sum(engine.ranks.exchange(sum(batch.num_supervised_tokens for batch in batches)))
    engine.forward_backward(list(batches), denominator=denominator, num_padded_tokens=padded)
    return {name: p.main_grad / denominator for name, p in engine.modules[0].named_parameters()}


def step_of_one_rank(rank: int, port: int, folder: Path) -> None:
    """The step of a data-parallel rank in a process of its own; writes its gradients and their errors."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS),
    }  # fmt: skip
    torch.set_num_threads(1)
    recipe, job = torch.load(folder / "given.pt", weights_only=False)
    launcher = LauncherEnvironment(rank=rank, world_size=NUM_RANKS, local_rank=rank, is_launched=True)
    with cpu_megatron():
        engine = make_engine(recipe, job, launcher)
        # In its first step megatron-core notes which gradients come, and waits for those from then on.
        take_gradients(engine, job.batches[0])
        gradients = take_gradients(engine, job.batches[rank])
        module: Any = engine.modules[0]
        torch.save((gradients, gradient_errors(module, job.gradients, gradients)), folder / f"rank{rank}.pt")
        stop_distributed()


@pytest.mark.parametrize("overlap", [False, True])
def test_tower_without_media_gets_gradients_only_where_they_are_awaited(
    overlap: bool, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(parallel={"overlap_grad_reduce": overlap})
    [job] = make_jobs("qwen3_vl", {"one": {}}, cases=("text", "text"))
    counts: dict[str, int] = {}
    with cpu_megatron():
        engine = make_engine(recipe, job)
        for name, parameter in engine.modules[0].named_parameters():
            counts[name] = 0

            def count(_gradient: torch.Tensor, name: str = name) -> None:
                counts[name] += 1

            parameter.register_hook(count)
        gradients = take_gradients(engine, job.batches[0])
        stop_distributed()
    vision = {name for name in counts if name.startswith("vision_model.")}
    assert {counts[name] for name in vision} == {0}  # alone, nothing is exchanged, overlapped or not
    assert {counts[name] for name in set(counts) - vision} == {2}
    assert not any(gradients[name].any() for name in vision)


@pytest.mark.slow
def test_step_with_media_on_one_rank_ends_with_equal_gradients(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(
        num_processes=NUM_RANKS,
        parallel={"overlap_grad_reduce": True},
        optimizer={"use_distributed_optimizer": False},  # every rank ends with the whole gradient
    )
    # dealt out in turn: the second rank has text alone, the first one in its last micro-batch
    [job] = make_jobs("qwen3_vl", {"dp": {"num_dp": NUM_RANKS}}, cases=("images", "text", "text", "text"))
    torch.save((recipe, job), tmp_path / "given.pt")
    multiprocessing.spawn(step_of_one_rank, (free_port(), tmp_path), nprocs=NUM_RANKS)
    (first, errors), (second, _) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(first[name].any() for name in first if name.startswith("vision_model."))
    assert max(errors.values()) < 1e-3
