# SPDX-License-Identifier: Apache-2.0
"""Exchanges that overlap with the passes come in one order on all ranks; the short way waits and reports for them."""

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
from models.contract.record import iter_metrics
from models.contract.site import Site
from models.datasets.prepare.job import write_dataset
from models.datasets.scenes import SceneKind, scene_at
from models.datasets.shards import RawSample
from models.parity.compare import load
from models.parity.jobs import make_jobs
from models.training.cpu import cpu_megatron
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import start_megatron
from models.training.progress import TrainOptions
from models.training.start import train
from tests.models.common.short_way import short_way_everywhere
from tests.models.training.trainer import Trainer, free_port

NUM_RANKS, NUM_STEPS = 2, 3
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
MIXES: dict[str, dict[SceneKind, float]] = {
    "qwen3_vl": {"text": 0.7, "caption": 0.15, "video": 0.15},
    "qwen3_omni": {"text": 0.6, "caption": 0.1, "video": 0.1, "audio": 0.2},
}
"""Of the micro-batches of two ranks, some pairs have media on one rank only."""


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


@pytest.fixture(scope="module")
def mixed(all_families: Site) -> Site:
    """The site with samples most of which are text alone."""

    for model, mix in MIXES.items():
        scenes = [scene_at(index, split="train", mix=mix) for index in range(64)]
        write_dataset(
            Path(all_families.datasets) / f"mixed-{model}",
            {"train": scenes},
            lambda scene: RawSample(scene.key, scene.members()),
            about={},
            shard_size=16,
        )
    return all_families


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "num_processes", "parallel", "freeze"),
    [
        pytest.param("qwen3_vl", 2, OVERLAP, [], id="dp2"),
        pytest.param("qwen3_vl", 2, OVERLAP, ["language"], id="dp2-frozen-language", marks=pytest.mark.slow),
        pytest.param(
            "qwen3_vl", 4, OVERLAP | {"pipeline_model_parallel_size": 2}, [], id="pp2-dp2", marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen3_omni", 2, OVERLAP | {"expert_model_parallel_size": 2}, [], id="ep2", marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen3_omni", 2, {"expert_model_parallel_size": 2}, ["language"], id="ep2-frozen-language",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_ranks_with_and_without_media_exchange_in_one_order(
    model: str,
    num_processes: int,
    parallel: dict[str, Any],
    freeze: list[str],
    mixed: Site,
    trainer: Trainer,
    make_recipe: Any,
    tmp_path: Path,
) -> None:
    # In many buckets, as models that are not tiny have. Where each rank goes by its own passes, ranks exchange
    # different buckets, or one waits for the other forever.
    sections: dict[str, Any] = {
        "model": {"family": model, "checkpoint": f"tiny-{model}", "freeze": freeze},
        "data": {"dataset": f"mixed-{model}", "seq_length": 512},
        "train": {"micro_batch_size": 1, "global_batch_size": 8},
    }
    train(make_recipe(**sections), mixed, tmp_path / "alone", TrainOptions(stop_after=4))
    together = make_recipe(num_processes, parallel=parallel, **sections)
    trainer.start(
        together, tmp_path / "together", "--stop-after", "4", "--step-timeout", "60", fault="small-buckets"
    )
    assert set(trainer.wait()) == {0}, (tmp_path / "together.rank0.log").read_text()[-2000:]
    ours, theirs = (list(iter_metrics(tmp_path / name)) for name in ("together", "alone"))
    assert [row["sample_digest"] for row in ours] == [row["sample_digest"] for row in theirs]
    for column in ("lm_loss", "grad_norm"):
        assert [row[column] for row in ours] == pytest.approx([row[column] for row in theirs], rel=2e-5)


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
