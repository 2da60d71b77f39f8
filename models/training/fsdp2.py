# SPDX-License-Identifier: Apache-2.0
"""The FSDP2 engine: the model of transformers under torch's `fully_shard`, on CUDA, NPU or CPU.

A second implementation that shares recipe, data, loss, schedule and metrics with the Megatron engine, and nothing of
its model, parallelism, optimizer or checkpoints.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models.common.batch import IGNORED_LABEL, Batch
from models.common.settings import DTYPES
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe
from models.training import random_state
from models.training.engine import LossSums, UpdateResult
from models.training.hf_inputs import hf_inputs, with_blank_image
from models.training.loss import loss_weights
from models.training.optimizer import build_scheduler
from models.training.parallel import LauncherEnvironment, Ranks, start_data_parallel
from models.training.parameters import PARTS


class Fsdp2Engine:
    """See :class:`models.training.engine.Engine`."""

    patches: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, architecture: Architecture, ranks: Ranks, model: nn.Module) -> None:
        self.recipe, self.architecture, self.ranks, self.model = recipe, architecture, ranks, model
        self.optimizer = build_adamw(recipe, model)
        self.scheduler = build_scheduler(recipe, self.optimizer)
        self._pending: Any = None

    def forward_backward(
        self, batches: list[Batch], *, denominator: float, num_padded_tokens: int
    ) -> LossSums:
        """Gradients of one global batch."""
        self.discard()
        sums: list[Tensor] = []
        for index, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(index == len(batches) - 1)  # type: ignore[operator]
            loss = self._loss(batch)
            (loss * (self.ranks.dp_size / denominator)).backward()  # fully_shard averages over ranks
            sums.append(loss.detach().double())
        return self._sums(sums, batches)

    @torch.no_grad()
    def update(self) -> UpdateResult:
        """Clip, step the optimizer and the schedule."""
        gradients = [
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        grad_norm = float(norm)
        is_updated = math.isfinite(grad_norm)
        if is_updated:
            limit = self.recipe.optimizer.clip_grad
            if limit > 0:
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            self.optimizer.step()
            self.scheduler.step(1)
        return UpdateResult(is_updated=is_updated, grad_norm=grad_norm, learning_rate=self.learning_rate())

    def learning_rate(self) -> float:
        """Rate of the parameters without a multiplier, after the schedule's last step."""
        plain = [group["lr"] for group in self.optimizer.param_groups if group["lr_mult"] == 1.0]
        return float(plain[0]) if plain else self.recipe.optimizer.lr

    def discard(self) -> None:
        """Drop the gradients of this step."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> LossSums:
        """Loss sums of held-out micro-batches."""
        self.model.eval()
        sums = [self._loss(batch).double() for batch in batches]
        self.model.train()
        return self._sums(sums, batches)

    def num_parameters(self) -> dict[str, int]:
        """Parameters of the whole model by part."""
        counts: dict[str, int] = dict.fromkeys(PARTS, 0)
        for name, parameter in self.model.named_parameters():
            counts["total"] += parameter.numel()
            counts["vision" if "visual." in name else "audio" if "audio_tower." in name else "language"] += (
                parameter.numel()
            )
            counts["trainable"] += parameter.numel() if parameter.requires_grad else 0
        return counts

    def save(self, folder: Path, *, with_optimizer: bool, is_async: bool) -> None:
        """Write a torch DCP checkpoint."""
        state = self._state(with_optimizer=with_optimizer)
        if is_async:
            self._pending = dcp.async_save(state, checkpoint_id=str(folder), process_group=self.ranks.control)
        else:
            dcp.save(state, checkpoint_id=str(folder))

    def is_save_finished(self, *, is_blocking: bool) -> bool:
        """Whether the background writer of every rank is done."""
        if self._pending is None:
            return True
        if is_blocking or all(self.ranks.exchange(self._pending.done())):
            self._pending.result()
            self._pending = None
        return self._pending is None

    def load(self, folder: Path, *, with_optimizer: bool, same_layout: bool) -> None:
        """Read what :meth:`save` wrote, at any number of ranks."""
        state = self._state(with_optimizer=with_optimizer)
        if not same_layout:
            del state[f"random_{self.ranks.rank}"]
        dcp.load(state, checkpoint_id=str(folder))
        dcp_state.set_model_state_dict(self.model, state["model"])
        if with_optimizer:
            dcp_state.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if same_layout:
            random_state.restore(state[f"random_{self.ranks.rank}"], self.ranks.device)

    def _state(self, *, with_optimizer: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"model": dcp_state.get_model_state_dict(self.model)}
        if with_optimizer:
            state["optimizer"] = dcp_state.get_optimizer_state_dict(self.model, self.optimizer)
        state["scheduler"] = self.scheduler.state_dict()
        state[f"random_{self.ranks.rank}"] = random_state.capture(self.ranks.device)
        return state

    def _loss(self, batch: Batch) -> Tensor:
        """Weighted sum of token losses of one micro-batch."""
        batch = with_blank_image(batch.to(self.ranks.device), self.architecture)
        assert batch.labels is not None
        logits = self.model(**hf_inputs(batch, self.architecture)).logits  # [b, s, v]
        token_losses = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(batch.labels.shape)
        weights, _ = loss_weights(batch, self.recipe.train.loss_reduction)
        return (token_losses * weights).sum()

    def _sums(self, sums: list[Tensor], batches: list[Batch]) -> LossSums:
        reduction = self.recipe.train.loss_reduction
        return LossSums(
            loss=float(torch.stack(sums).sum()),
            denominator=float(sum(loss_weights(batch, reduction)[1] for batch in batches)),
        )


def device_patches() -> AbstractContextManager[tuple[str, ...]]:
    """Nothing is patched: torch knows every device by itself."""
    return nullcontext(())


def start_engine(
    recipe: Recipe,
    architecture: Architecture,
    folder: Path,
    launcher: LauncherEnvironment,
    *,
    timeout_s: float,
    patches: tuple[str, ...],
) -> Fsdp2Engine:
    """Start the ranks, build the model on the meta device, shard it, and fill it from rank 0's copy."""
    check_recipe(recipe, architecture)
    ranks = start_data_parallel(recipe, launcher, timeout_s=timeout_s)
    return Fsdp2Engine(recipe, architecture, ranks, build_sharded(recipe, folder, ranks))


def check_recipe(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse what this engine does not do.

    Raises:
        ConfigError: all such settings, named together.
    """
    offload = recipe.optimizer.cpu_offload_fraction
    refused = {
        "parallel: tensor, pipeline, context or expert parallel": recipe.parallel.model_parallel_size > 1
        or recipe.parallel.expert_model_parallel_size > 1,
        "data.packing": recipe.data.packing,
        "precision.dtype = 'fp16'": recipe.precision.dtype == "fp16",
        "precision.fp8": recipe.precision.fp8 is not None,
        "precision.recompute = 'selective'": recipe.precision.recompute == "selective",
        "optimizer.use_precision_aware_optimizer": recipe.optimizer.use_precision_aware_optimizer,
        "optimizer.cpu_offload_fraction between 0 and 1": 0.0 < offload < 1.0,
        f"model.family = '{architecture.family}' (its audio tower)": architecture.audio is not None,
        "model.num_layers": recipe.model.num_layers is not None,
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        raise ConfigError(
            "the fsdp2 engine cannot run this recipe", where=f"recipe {recipe.name}", got="; ".join(found),
            fix="change these settings, or use train.engine = 'megatron'",
        )  # fmt: skip


def build_sharded(recipe: Recipe, folder: Path, ranks: Ranks) -> nn.Module:
    """The checkpoint's model with parameters and optimizer cut over all ranks; only rank 0 ever holds it whole."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = bool(config.tie_word_embeddings)
    whole: dict[str, Any] = {}
    buffers: dict[str, Tensor] = {}
    if ranks.rank == 0:
        source = (
            AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa"
            )
            if recipe.model.init == "checkpoint"
            else AutoModelForImageTextToText.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        )
        whole, buffers = source.state_dict(), dict(source.named_buffers())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
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
    for name, buffer in model.named_buffers():  # rotary frequencies are in no checkpoint
        on_device = (buffers[name] if ranks.rank == 0 else torch.empty_like(buffer)).to(ranks.device)
        distributed.broadcast(on_device, 0)
        buffer.copy_(on_device)
    return model


def shard(model: nn.Module, recipe: Recipe) -> None:
    """Wrap plan: every decoder layer, every vision block, and the rest; layers are fetched one ahead."""
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
        return "projector" if ".merger." in name or "deepstack_merger" in name else "vision"
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
