# SPDX-License-Identifier: Apache-2.0
"""Processes that a launcher started: which device is whose, how they meet. Without Megatron: that takes seconds."""

import importlib.util
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from models.contract.errors import ConfigError
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe


def pick_device(local_rank: int) -> torch.device:
    """The accelerator of this process, or the CPU where there is none.

    Raises:
        ConfigError: more processes than accelerators on this node.
    """
    if importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")  # registers torch.npu
    for kind in ("cuda", "npu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            if local_rank >= backend.device_count():
                raise ConfigError(
                    "more processes than devices",
                    where=f"LOCAL_RANK={local_rank}",
                    expected=f"at most {backend.device_count()} processes on this node",
                    fix="lower --nproc-per-node or make more devices visible",
                )
            backend.set_device(local_rank)
            return torch.device(kind, local_rank)
    return torch.device("cpu")


def require_processes(recipe: Recipe, launcher: LauncherEnvironment) -> None:
    """Check the number of processes.

    Raises:
        ConfigError: the launcher started another number of them than the recipe asks for.
    """
    if launcher.world_size != recipe.num_processes:
        raise ConfigError(
            "wrong number of processes",
            where=f"recipe {recipe.name}: num_processes",
            expected=str(recipe.num_processes),
            got=f"WORLD_SIZE={launcher.world_size}",
            fix="start as many processes as the recipe names, or change num_processes",
        )


def start_distributed(recipe: Recipe, launcher: LauncherEnvironment, *, timeout_s: float) -> torch.device:
    """Check the number of processes and start ``torch.distributed``.

    Raises:
        ConfigError: the launcher started another number of processes than the recipe asks for.
    """
    require_processes(recipe, launcher)
    return join_processes(launcher, timeout_s=timeout_s)


def join_processes(launcher: LauncherEnvironment, *, timeout_s: float) -> torch.device:
    """Start ``torch.distributed`` with the backend of this process's device, which is returned.

    It is not told the device: NCCL would then connect each of Megatron's 21 groups as it is made, whether or not
    anybody ever talks through it. On one H200 that took 1.6 s to start, 9.5 s to end and 6.8 GiB more of its memory
    than with two groups in use, which take 0.04 and 0.5 s.
    """
    device = pick_device(launcher.local_rank)
    backend = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}[device.type]
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if not launcher.is_launched:
        options |= {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group(backend, **options)
    return device


def control_group(device: torch.device, world_size: int, *, timeout_s: float) -> Any:
    """A gloo group of all ranks; the default group where that is gloo already, None for one process."""
    if world_size == 1:
        return None
    if device.type == "cpu":
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
