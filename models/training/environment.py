# SPDX-License-Identifier: Apache-2.0
"""What a run ran on: versions, commit, device, and whatever else could explain a different number."""

import logging
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from models.common.settings import resolve_attention_backend
from models.contract.layout import expert_ranks
from models.contract.recipe import Recipe
from models.contract.site import REPOSITORY

logger = logging.getLogger(__name__)

PACKAGES = (
    "torch", "torchvision", "megatron-core", "transformer-engine", "transformers", "megatron-energon",
    "triton", "numpy", "safetensors", "tokenizers", "flash-attn", "torch-npu",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_SCALE_LAUNCH_QUEUES",
    "NCCL_ALGO", "NCCL_PROTO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN",
    "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONHASHSEED",
)  # fmt: skip


def describe_environment(recipe: Recipe, device: torch.device, patches: tuple[str, ...]) -> dict[str, Any]:
    """Fingerprint of software: versions, commit, kernels, determinism variables, patches in force."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "patches": list(patches),
        "kernels": describe_kernels(recipe, device),
    }


def describe_kernels(recipe: Recipe, device: torch.device) -> str:
    """Whose kernels the layers run on, and why where a GPU has better ones; how tokens get to experts, if gathered."""
    if recipe.train.engine != "megatron":
        return "transformers"
    is_gathered = recipe.parallel.moe_token_dispatcher_type == "allgather" and expert_ranks(recipe) > 1
    return _describe_layers(recipe, device) + (", gathered tokens" if is_gathered else "")


def _describe_layers(recipe: Recipe, device: torch.device) -> str:
    backend = resolve_attention_backend(recipe.model.attention_backend, device.type)
    if backend == "te":
        has_own_experts = recipe.model.experts_backend == "grouped"
        return "transformer_engine, grouped experts" if has_own_experts else "transformer_engine"
    if device.type == "cuda" and recipe.model.attention_backend == "auto":
        logger.warning("TransformerEngine is not installed: torch's kernels take over, slower")
        return "torch, as transformer_engine is not installed"
    return "torch"


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Kind, name, count and memory of the devices of this node, and its processor."""
    facts: dict[str, Any] = {
        "kind": device.type,
        "cpu_model": _cpu_model(),
        "num_cores": psutil.cpu_count(logical=True),
        "num_threads": torch.get_num_threads(),
        "host_memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cpu":
        name, memory = facts["cpu_model"], facts["host_memory_bytes"]
        return facts | {"device_name": name, "device_count": 1, "memory_bytes": memory}
    backend = getattr(torch, device.type)
    return facts | {
        "device_name": backend.get_device_name(device),
        "device_count": backend.device_count(),
        "memory_bytes": device_memory_bytes(device),
    }


def device_memory_bytes(device: torch.device) -> int:
    """All memory of an accelerator."""
    return getattr(torch, device.type).get_device_properties(device).total_memory


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: the allocator's on an accelerator, resident on a CPU."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return getattr(torch, device.type).max_memory_allocated(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        pass
    return platform.processor() or platform.machine()
