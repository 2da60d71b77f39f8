# SPDX-License-Identifier: Apache-2.0
"""The transformers model of a checkpoint folder, cut over all ranks by torch's `fully_shard`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.utils.logging import disable_progress_bar

from models.common.partial_models import partial_model
from models.common.settings import DTYPES
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe
from models.training.parallel import Ranks


def build_sharded(recipe: Recipe, architecture: Architecture, folder: Path, ranks: Ranks) -> nn.Module:
    """The checkpoint's model with parameters cut over all ranks; only rank 0 ever holds it whole.

    Raises:
        ConfigError: transformers cannot load the folder.
    """
    disable_progress_bar()
    config = _config(recipe, architecture, folder)
    whole: dict[str, Any] = {}
    buffers: dict[str, Tensor] = {}
    if ranks.rank == 0:
        source = _build(recipe, architecture, config, folder if recipe.model.init == "checkpoint" else None)
        whole, buffers = source.state_dict(), dict(source.named_buffers())
    with torch.device("meta"):
        model = _build(recipe, architecture, config, None)
    freeze(model, recipe)
    if recipe.precision.recompute == "full":
        model.gradient_checkpointing_enable()
    shard(model, recipe)
    offloads = recipe.optimizer.cpu_offload_fraction > 0
    model.to_empty(device="cpu" if offloads else ranks.device)
    options = dcp_state.StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offloads
    )
    dcp_state.set_model_state_dict(model, whole, options=options)
    for name, buffer in list(model.named_buffers()):  # rotary frequencies are in no checkpoint
        on_device = (buffers[name] if ranks.rank == 0 else torch.empty_like(buffer)).to(ranks.device)
        distributed.broadcast(on_device, 0)
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = on_device  # only parameters are offloaded
    return model


def _config(recipe: Recipe, architecture: Architecture, folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.tie_word_embeddings = architecture.text.tie_word_embeddings
    config.update(partial_model(architecture).changes)
    if recipe.model.num_layers is not None:
        config.get_text_config().num_hidden_layers = recipe.model.num_layers
    return config


def _build(recipe: Recipe, architecture: Architecture, config: Any, folder: Path | None) -> Any:
    """The part that trains, in fp32: from the folder's weights, or drawn as transformers draws them."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if folder is not None and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            "the fsdp2 engine starts from Hugging Face weights",
            where=str(folder),
            expected="*.safetensors",
            fix="export the checkpoint with `qwen-harness convert megatron-to-hf`, or `dcp-to-hf`",
        )
    if folder is None:
        model = AutoModelForMultimodalLM.from_config(config, **options)
    else:
        try:
            model = AutoModelForMultimodalLM.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, **options
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                "the checkpoint's weights cannot be loaded",
                where=f"{folder} (recipe {recipe.name})",
                got=str(error).strip().splitlines()[0][:300],
                fix="check it with `qwen-harness convert verify`, or copy it again",
            ) from None
    return model.get_submodule(partial_model(architecture).part)


def shard(model: nn.Module, recipe: Recipe) -> None:
    """Wrap plan: every layer of every tower, and the rest; layers are fetched one ahead."""
    dtype = DTYPES[recipe.precision.dtype]
    mixed = dtype is not torch.float32
    reduce = torch.float32 if recipe.precision.grad_reduce_in_fp32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce) if mixed else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy() if recipe.optimizer.cpu_offload_fraction > 0 else OffloadPolicy()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and _is_stack(module)]
    for stack in stacks:
        for layer in stack:
            fully_shard(layer, mp_policy=policy, offload_policy=offload)
        for layer, following in zip(stack, list(stack)[1:], strict=False):
            layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    fully_shard(model, mp_policy=policy, offload_policy=offload)


def _is_stack(modules: nn.ModuleList) -> bool:
    """Layers of one tower: more than one module, all of one class, with attention inside."""
    kinds = {type(module) for module in modules}
    return (
        len(modules) > 1
        and len(kinds) == 1
        and any("attn" in name for name, _ in modules[0].named_children())
    )


def part_of(name: str) -> str:
    """Freezing group of a transformers parameter."""
    if "visual." in name:
        is_merger = ".merger." in name or "deepstack_merger" in name or ".merger_list." in name
        return "projector" if is_merger else "vision"
    return "audio" if "audio_tower." in name else "language"


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Take parameters out of training by group."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part_of(name) not in recipe.model.freeze


def build_adamw(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with the groups of the Megatron engine: no decay on biases and vectors, learning rates per part."""
    settings = recipe.optimizer
    multipliers = {"vision": settings.vision_lr_mult, "projector": settings.projector_lr_mult}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim == 1 or name.endswith(".bias") else 1.0
            groups.setdefault((decay, multipliers.get(part_of(name), 1.0)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters, "wd_mult": decay, "lr_mult": multiplier,
                "max_lr": settings.lr * multiplier, "min_lr": settings.min_lr * multiplier,
            }
            for (decay, multiplier), parameters in groups.items()
        ],
        lr=settings.lr, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps,
        weight_decay=settings.weight_decay, foreach=True,
    )  # fmt: skip
