# SPDX-License-Identifier: Apache-2.0
"""Process groups: started from a launcher's environment, handed on as arguments.

The only module that reads ``megatron.core.parallel_state``. Everything else takes :class:`Ranks`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from torch import distributed

from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.training import random_state
from models.training.processes import control_group, start_distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Where this process stands in the layout, and the groups it talks through."""

    rank: int
    world_size: int
    device: torch.device
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool
    counts_loss: bool
    """Its loss sum is one of those that add up to the global one: last stage, first tensor-parallel rank."""
    counts_samples: bool
    """Speaks for its data-parallel rank: also the first context-parallel rank."""
    cp_rank: int
    tp_rank: int
    layout: dict[str, int]
    """tp, pp, cp, ep, etp, dp, vpp."""
    groups: ProcessGroupCollection | None
    """Megatron's groups; None for the FSDP2 engine."""
    control: Any
    """gloo group of all processes for small Python objects, or None when there is one process."""

    def exchange(self, item: Any) -> list[Any]:
        """Give `item` to every rank; returns the items of all ranks, in rank order."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        distributed.all_gather_object(items, item, group=self.control)
        return items

    def barrier(self) -> None:
        """Wait for every rank, without touching the accelerator."""
        if self.world_size > 1:
            distributed.barrier(group=self.control)


def start_megatron(recipe: Recipe, launcher: LauncherEnvironment, *, timeout_s: float) -> Ranks:
    """Start ``torch.distributed`` and Megatron's groups for the recipe's layout, and seed every generator."""
    device = start_distributed(recipe, launcher, timeout_s=timeout_s)
    parallel = recipe.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=device.type != "cpu",
    )
    torch.manual_seed(recipe.train.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.train.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    is_last = parallel_state.is_pipeline_last_stage()
    tp_rank, cp_rank = groups.tp.rank(), groups.cp.rank()
    return Ranks(
        rank=launcher.rank,
        world_size=launcher.world_size,
        device=device,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=is_last,
        counts_loss=is_last and tp_rank == 0,
        counts_samples=is_last and tp_rank == 0 and cp_rank == 0,
        cp_rank=cp_rank,
        tp_rank=tp_rank,
        layout={
            "tp": groups.tp.size(), "pp": groups.pp.size(), "cp": groups.cp.size(), "ep": groups.ep.size(),
            "etp": groups.expt_tp.size(), "dp": groups.dp.size(),
            "vpp": parallel.virtual_pipeline_model_parallel_size or 1,
        },
        groups=groups,
        control=control_group(device, launcher.world_size, timeout_s=timeout_s),
    )  # fmt: skip


def start_data_parallel(recipe: Recipe, launcher: LauncherEnvironment, *, timeout_s: float) -> Ranks:
    """Start ``torch.distributed`` alone: every rank is a data-parallel rank, as the FSDP2 engine wants it."""
    device = start_distributed(recipe, launcher, timeout_s=timeout_s)
    torch.manual_seed(recipe.train.seed)
    size = launcher.world_size
    return Ranks(
        rank=launcher.rank, world_size=size, device=device, dp_rank=launcher.rank, dp_size=size,
        is_first_stage=True, is_last_stage=True, counts_loss=True, counts_samples=True, cp_rank=0,
        tp_rank=0,
        layout={"tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": size, "vpp": 1},
        groups=None,
        control=control_group(device, size, timeout_s=timeout_s),
    )  # fmt: skip


def stage_of_chunk(chunk: int, ranks: Ranks) -> tuple[bool, bool]:
    """Whether a model chunk of this rank is the first and whether it is the last of the whole model."""
    vp_stage = chunk if ranks.layout["vpp"] > 1 else None
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )


def stop_distributed() -> None:
    """Take the groups down, and the generators and the log of experts that go with them, where they came up."""
    if distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        random_state.reset_tensor_parallel()
        destroy_moe_metrics_tracker()  # it has a place for each layer of the model that was
        distributed.destroy_process_group()
