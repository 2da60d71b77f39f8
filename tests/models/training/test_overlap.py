# SPDX-License-Identifier: Apache-2.0
"""Exchanges that overlap with the passes: the short way through a layer waits and reports as the modules do."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import distributed, multiprocessing

from models.contract.families import detect_family, family_part
from models.contract.launcher import LauncherEnvironment
from models.parity.compare import load
from models.parity.jobs import make_jobs
from models.training.cpu import cpu_megatron
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import start_megatron
from tests.models.common.short_way import short_way_everywhere
from tests.models.training.trainer import free_port

NUM_RANKS, NUM_STEPS = 2, 3


def steps_of_one_rank(rank: int, port: int, folder: Path) -> None:
    """Some steps of a data-parallel rank in a process of its own; writes the loss of each and the weights."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS),
    }  # fmt: skip
    torch.set_num_threads(1)
    recipe, job, is_short = torch.load(folder / "given.pt", weights_only=False)
    launcher = LauncherEnvironment(rank=rank, world_size=NUM_RANKS, local_rank=rank, is_launched=True)
    architecture = family_part(detect_family(job.hf_config), "config").ModelConfig.from_hf(job.hf_config)
    with cpu_megatron(), short_way_everywhere() if is_short else nullcontext():
        engine = MegatronEngine(recipe, architecture, start_megatron(recipe, launcher, timeout_s=120), ())
        load(engine.modules[0], job.weights)
        engine.prepare()
        losses = []
        for _ in range(NUM_STEPS):
            batches = list(job.batches[rank])
            padded = NUM_RANKS * sum(batch.input_ids.numel() for batch in batches)
            sums = engine.forward_backward(batches, denominator=1.0, num_padded_tokens=padded)
            assert engine.update().is_updated
            losses.append(sums.loss)
        engine._gather_weights()
        weights = {name: p.detach().clone() for name, p in engine.modules[0].named_parameters()}
        torch.save((losses, weights), folder / f"rank{rank}.pt")
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


@pytest.mark.slow
def test_short_way_steps_as_modules_do_with_overlapped_exchanges(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(
        num_processes=NUM_RANKS,
        parallel={"overlap_grad_reduce": True, "overlap_param_gather": True},
        optimizer={"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 0},
    )
    [job] = make_jobs("qwen3_vl", {"dp": {"num_dp": NUM_RANKS}}, cases=("images", "text", "text", "text"))
    results = []
    for is_short in (False, True):
        torch.save((recipe, job, is_short), tmp_path / "given.pt")
        multiprocessing.spawn(steps_of_one_rank, (free_port(), tmp_path), nprocs=NUM_RANKS)
        results.append(
            [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]
        )
    plain, short = results
    for (losses, weights), (short_losses, short_weights) in zip(plain, short, strict=True):
        assert short_losses == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(short_weights, weights, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(short[0][1][name], short[1][1][name]) for name in short[0][1])
