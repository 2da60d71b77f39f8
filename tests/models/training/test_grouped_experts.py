# SPDX-License-Identifier: Apache-2.0
"""Experts on the short way under data parallelism: used where they lie, one launch adds up all their gradients."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from models.common import grouped_experts
from models.common.kernels.grouped import as_one
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.parity.compare import gradient_errors
from models.parity.jobs import make_jobs
from models.parity.layouts import Job
from models.training.cpu import cpu_megatron
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import stop_distributed
from tests.models.common.grouped_way import TorchGroupedLinear, experts_of, grouped_way_everywhere
from tests.models.training.engines import ALONE, make_engine
from tests.models.training.trainer import free_port

MakeRecipe = Callable[..., Recipe]
NUM_RANKS, NUM_STEPS = 2, 2
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EP = {"expert_model_parallel_size": 2}
STEADY = {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 0, "adam_eps": 1e-5}
"""AdamW moves a weight by the sign of a gradient that is next to nothing, unless that is small beside `adam_eps`."""
MOE = {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl_moe"}


def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to copy weights together, or to go expert by expert."""

    def joined(weights: Any) -> Tensor:
        view = as_one(weights)
        assert view is not None, "weights were copied"
        assert view.data_ptr() == weights[0].data_ptr()
        return view

    monkeypatch.setattr(grouped_experts, "_joined", joined)
    monkeypatch.setattr(TorchGroupedLinear, "forward", None)


def steps(
    engine: MegatronEngine, job: Job, rank: int, num_steps: int = NUM_STEPS
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of some steps, the gradients of the first of them and the weights after the last, by parameter name."""
    batches = list(job.batches[rank])
    denominator = sum(engine.ranks.exchange(sum(batch.num_supervised_tokens for batch in batches)))
    padded = sum(engine.ranks.exchange(sum(batch.input_ids.numel() for batch in batches)))
    losses, gradients = [], {}
    for _ in range(num_steps):
        sums = engine.forward_backward(batches, denominator=denominator, num_padded_tokens=padded)
        if not gradients:
            gradients = {
                name: p.main_grad / denominator
                for name, p in engine.modules[0].named_parameters()
                if p.requires_grad
            }
        assert engine.update().is_updated
        losses.append(sums.loss)
    engine._gather_weights()
    weights = {name: p.detach().clone() for name, p in engine.modules[0].named_parameters()}
    return losses, gradients, weights


def test_weights_and_gradients_are_used_where_data_parallelism_put_them(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = make_jobs("qwen3_vl_moe", {"one": {}}, cases=("image", "image"))
    counts: dict[str, int] = {}
    with cpu_megatron(), grouped_way_everywhere():
        engine = make_engine(make_recipe(model=MOE, optimizer=STEADY), job)
        in_place(monkeypatch)
        module: Any = engine.modules[0]
        found = experts_of(module)
        for linear in (linear for experts in found for linear in (experts.linear_fc1, experts.linear_fc2)):
            weights = [getattr(linear, f"weight{index}") for index in range(6)]
            main_grads: Any = as_one([weight.main_grad for weight in weights])
            assert main_grads is not None
            for index, weight in enumerate(weights):
                main_grads[index].fill_(index)
                assert bool((weight.main_grad == index).all())
        for name, parameter in module.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda _, name=name: counts.update({name: counts.get(name, 0) + 1}))
        supervised = sum(batch.num_supervised_tokens for batch in job.batches[0])
        # With next to nothing of the router's own loss, which the reference does without.
        engine.forward_backward(list(job.batches[0]), denominator=supervised, num_padded_tokens=10**12)
        gradients = {name: parameter.main_grad / supervised for name, parameter in module.named_parameters()}
        errors = gradient_errors(module, job.gradients, gradients)
        stop_distributed()
    # Nobody waits for them: a layer has one that autograd asks for, in each of two micro-batches.
    assert len(found) == 3
    assert list(counts.values()) == [2, 2, 2]
    assert errors.keys() == job.gradients.keys()
    assert max(errors.values()) < 1e-4


def test_frozen_experts_step(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(model=MOE | {"freeze": ["language"]}, optimizer=STEADY)
    [job] = make_jobs("qwen3_vl_moe", {"one": {}}, cases=("image",))
    with cpu_megatron(), grouped_way_everywhere():
        engine = make_engine(recipe, job)
        monkeypatch.setattr(TorchGroupedLinear, "forward", None)
        _, gradients, weights = steps(engine, job, 0, num_steps=1)
        stop_distributed()
    assert gradients
    assert all(name.startswith("vision_model.") for name in gradients)
    assert any(gradient.any() for gradient in gradients.values())
    assert weights


def steps_of_one_rank(rank: int, port: int, folder: Path) -> None:
    """Some steps of a rank in a process of its own; writes what came out, and the errors of the first gradients."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS),
    }  # fmt: skip
    torch.set_num_threads(1)
    recipe, job = torch.load(folder / "given.pt", weights_only=False)
    launcher = LauncherEnvironment(rank=rank, world_size=NUM_RANKS, local_rank=rank, is_launched=True)
    with cpu_megatron(), grouped_way_everywhere(), pytest.MonkeyPatch.context() as patched:
        engine = make_engine(recipe, job, launcher)
        in_place(patched)
        losses, _, weights = steps(engine, job, rank)
        torch.save((losses, weights), folder / f"rank{rank}.pt")
        stop_distributed()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "overlap"),
    [({}, OVERLAP), (EP, {}), (EP, OVERLAP)],
    ids=["dp2-overlapped", "ep2", "ep2-overlapped"],
)
def test_ranks_step_as_one_process_does(
    layout: dict[str, int], overlap: dict[str, bool], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    cases = ("text", "one token", "image", "text")
    [job] = make_jobs("qwen3_vl_moe", {"dp": {"num_dp": NUM_RANKS}}, cases=cases)
    [whole] = make_jobs("qwen3_vl_moe", {"one": {}}, cases=cases)
    with cpu_megatron(), grouped_way_everywhere(is_short=False):
        engine = make_engine(make_recipe(model=MOE, optimizer=STEADY), whole, ALONE)
        losses, _, weights = steps(engine, whole, 0)
        stop_distributed()
    recipe = make_recipe(NUM_RANKS, model=MOE, optimizer=STEADY, parallel=layout | overlap)
    torch.save((recipe, job), tmp_path / "given.pt")
    multiprocessing.spawn(steps_of_one_rank, (free_port(), tmp_path), nprocs=NUM_RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]
    assert [sum(pair) for pair in zip(*(found[0] for found in ranks), strict=True)] == pytest.approx(
        losses, rel=1e-5
    )
    num_local = 6 // layout.get("expert_model_parallel_size", 1)
    for rank, (_, found) in enumerate(ranks):
        for name, value in found.items():
            place, _, index = name.rpartition(".weight")
            if ".experts." in name:
                name = f"{place}.weight{int(index) + rank * num_local % 6}"
            torch.testing.assert_close(value, weights[name], atol=2e-5, rtol=1e-4)
