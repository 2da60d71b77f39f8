# SPDX-License-Identifier: Apache-2.0
"""Run parallel layouts on gloo or NCCL and compare loss and gradients with what one process or transformers computed.

    python -m torch.distributed.run --nproc-per-node 2 -m models.parity.layouts JOBS.pt RESULTS.json

One start of the processes runs many jobs, each with its own layout: starting them costs more than a job.
"""

import dataclasses
import gc
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, distributed

from models.common.batch import Batch
from models.common.context_parallel import local_index
from models.common.multimodal import MultimodalModel
from models.common.settings import ModelSettings
from models.contract.families import detect_family, family_part
from models.contract.whole_file import write_whole
from models.parity.compare import (
    gradient_errors,
    gradient_norm,
    gradient_square_sum,
    load,
    real_positions,
)
from models.training.cpu import enable_cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One comparison: a model, a layout, the micro-batches of every data-parallel rank, and what should come out."""

    name: str
    hf_config: dict[str, Any]
    settings: ModelSettings
    weights: dict[str, Tensor]
    """Global tensors by Megatron key."""
    batches: tuple[tuple[Batch, ...], ...]
    """For every data-parallel rank its micro-batches."""
    loss: float
    """Sum of token losses of all micro-batches over the number of supervised tokens."""
    gradients: dict[str, Tensor]
    """Of that loss, by Megatron key."""
    logits: tuple[tuple[Tensor, ...], ...] = ()
    """For every data-parallel rank and micro-batch [b, s, v]; empty where logits are not compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How far one layout is from the reference."""

    name: str
    loss_error: float
    """Relative."""
    gradient_error: float
    """Largest relative error of any parameter on any rank."""
    worst: str
    """That parameter."""
    num_gradients: int
    """Parameters that were compared, over all ranks."""
    missing: list[str] = field(default_factory=list)
    """Parameters of the reference that no rank compared."""
    gradient_norm_error: float = 0.0
    """Relative, of the norm over all gradients."""
    logits_error: float | None = None
    """Largest difference over the largest logit of its micro-batch, real positions; None where not compared."""


def main(jobs_file: str, results_file: str) -> None:
    """Run every job of a file; rank 0 writes the results after each, so that those before a failure are kept."""
    warnings.filterwarnings("ignore")
    jobs: list[Job] = torch.load(jobs_file, weights_only=False)
    backend = "gloo"
    if jobs[0].settings.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    else:
        enable_cpu()
    store, rank, world_size = next(distributed.rendezvous("env://"))
    results: list[dict[str, Any]] = []
    for number, (settings, same) in enumerate(itertools.groupby(jobs, key=lambda job: job.settings)):
        # Groups are taken down after every layout: each keeps threads that poll, and a layout has dozens of groups.
        own_store = distributed.PrefixStore(f"layout{number}", store)
        distributed.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)
        groups = start_groups(settings)
        for job in same:
            results.append(dataclasses.asdict(run_job(job, groups)))
            if rank == 0:
                write_whole(Path(results_file), json.dumps(results))
        parallel_state.destroy_model_parallel()
        del groups
        distributed.destroy_process_group()
        gc.collect()  # what still refers to the groups goes in circles


def run_job(job: Job, groups: ProcessGroupCollection) -> Result:
    """Run one job in its layout's groups, see :func:`start_groups`."""
    chunks = build_chunks(job, groups)
    batches = job.batches[groups.dp.rank()]
    logits_error = _logits_error(chunks, job, groups) if job.logits else None
    sums = _forward_backward(chunks, batches, job)
    total = torch.tensor(
        [sum(loss for loss, _ in sums), sum(count for _, count in sums)],
        dtype=torch.float64,
        device=job.settings.device,
    )
    distributed.all_reduce(total, group=groups.dp_cp)
    result = _compare(job, chunks, total)
    for chunk in chunks:
        # A token dispatcher keeps a piece of the graph, whose end has the hooks through which the wrapper holds all of
        # this: a circle that Python's collector does not see. Emptying the wrapper opens it.
        vars(chunk).clear()
    return dataclasses.replace(result, logits_error=logits_error)


def start_groups(settings: ModelSettings) -> ProcessGroupCollection:
    """megatron-core's process groups for a layout."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline_model_parallel_size,
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size,
        expert_tensor_parallel_size=settings.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def build_chunks(job: Job, groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    """This rank's model chunks with their weights, wrapped for data parallelism."""
    family = detect_family(job.hf_config)
    architecture = family_part(family, "config").ModelConfig.from_hf(job.hf_config)
    virtual = job.settings.virtual_pipeline_model_parallel_size
    ddp = DistributedDataParallelConfig()
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        model = family_part(family, "model").build_model(
            architecture,
            job.settings,
            groups=groups,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        load(model, job.weights)
        model.to(job.settings.device)
        model.config.finalize_model_grads_func = finalize_model_grads
        chunks.append(DistributedDataParallel(model.config, ddp, model, pg_collection=groups))
    return chunks


def _forward_backward(
    chunks: list[DistributedDataParallel], batches: tuple[Batch, ...], job: Job
) -> list[tuple[float, float]]:
    """Loss sums and supervised tokens of this rank's micro-batches; empty but on the last stage."""
    is_first = job.settings.context_parallel_size == 1 or parallel_state.get_context_parallel_rank() == 0

    def step(iterator: Iterator[Batch], model: MultimodalModel) -> tuple[Tensor, Any]:
        batch = next(iterator).to(job.settings.device)

        def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
            count = batch.num_supervised_tokens if is_first else 0
            num_tokens = torch.tensor(count, dtype=torch.int, device=losses.device)
            return losses.sum(), num_tokens, (losses.sum().item(), float(count))

        return model(batch), loss_function

    for chunk in chunks:
        chunk.zero_grad_buffer()
    model: Any = chunks if len(chunks) > 1 else chunks[0]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=batches[0].input_ids.shape[0],
        forward_only=False,
    )


def _logits_error(chunks: list[DistributedDataParallel], job: Job, groups: ProcessGroupCollection) -> float:
    """Run without labels and compare every rank's part of the logits: its positions, its part of the vocabulary."""
    rank, tp, cp = groups.dp.rank(), groups.tp, groups.cp
    batches = [dataclasses.replace(batch, labels=None) for batch in job.batches[rank]]
    wanted = dict(enumerate(job.logits[rank]))

    def step(iterator: Iterator[tuple[int, Batch]], model: MultimodalModel) -> tuple[Tensor, Any]:
        number, batch = next(iterator)

        def difference(logits: Tensor, non_loss_data: bool = True) -> float:
            reference, is_real = wanted[number], real_positions(batch)
            scale = reference[is_real].abs().max()
            if cp.size() > 1:
                packed = batch.cu_seqlens
                lengths = [batch.input_ids.shape[1]] if packed is None else packed.diff().tolist()
                kept = torch.from_numpy(local_index(lengths, cp.size(), cp.rank()))
                reference, is_real = reference[:, kept], is_real[:, kept]
            part = reference.chunk(tp.size(), dim=-1)[tp.rank()]
            worst = (logits.cpu() - part)[is_real].abs().max() if is_real.any() else torch.zeros(())
            return (worst / scale).item()

        return model(batch.to(job.settings.device)), difference

    iterators: list[Any] = [iter(enumerate(batches)) for _ in chunks]
    model: Any = chunks if len(chunks) > 1 else chunks[0]
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=batches[0].input_ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    worst = torch.tensor(max(found, default=0.0), device=job.settings.device)
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    return worst.item()


def _compare(job: Job, chunks: list[DistributedDataParallel], total: Tensor) -> Result:
    errors: dict[str, float] = {}
    squares = torch.zeros((), dtype=torch.float64, device=job.settings.device)
    for chunk in chunks:
        module: Any = chunk.module
        gradients = {name: parameter.main_grad.cpu() for name, parameter in module.named_parameters()}
        errors |= gradient_errors(module, job.gradients, gradients)
        squares += gradient_square_sum(module, gradients)
    distributed.all_reduce(squares)
    norm = gradient_norm(job.gradients)
    gathered: list[Any] = [None] * distributed.get_world_size()
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    loss = (total[0] / total[1]).item() if is_last else None
    distributed.all_gather_object(gathered, (errors, loss))
    flat = [(error, name) for rank_errors, _ in gathered for name, error in rank_errors.items()]
    gradient_error, worst = max(flat)
    losses = [loss for _, loss in gathered if loss is not None]
    return Result(
        name=job.name,
        loss_error=max(abs(loss - job.loss) / abs(job.loss) for loss in losses),
        gradient_error=gradient_error,
        worst=worst,
        num_gradients=len({name for _, name in flat}),
        missing=sorted(set(job.gradients) - {name for _, name in flat}),
        gradient_norm_error=abs(squares.item() ** 0.5 - norm) / norm,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
