# SPDX-License-Identifier: Apache-2.0
"""The FSDP2 engine: the model of transformers under torch's `fully_shard`, on CUDA, NPU or CPU.

A second implementation that shares recipe, data, loss, schedule and metrics with the Megatron engine, and nothing of
its model, parallelism, optimizer or checkpoints.
"""

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.tensor import DTensor

from models.common.batch import IGNORED_LABEL, Batch
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.training import random_state
from models.training.engine import LossSums, UpdateResult
from models.training.fsdp2_model import build_adamw, build_sharded, part_of
from models.training.hf_inputs import hf_inputs, with_blank_media
from models.training.load_balance import RouterTap, load_balancing_loss
from models.training.loss import loss_weights
from models.training.optimizer import build_scheduler, check_optimizer
from models.training.parallel import Ranks, start_data_parallel
from models.training.parameters import PARTS
from models.training.trace import transformers_points


class Fsdp2Engine:
    """See :class:`models.training.engine.Engine`."""

    patches: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, architecture: Architecture, ranks: Ranks, model: nn.Module) -> None:
        self.recipe, self.architecture, self.ranks, self.model = recipe, architecture, ranks, model
        self.optimizer = build_adamw(recipe, model)
        self.scheduler = build_scheduler(recipe, self.optimizer)
        self._pending: Any = None
        self._saving_group: Any = None
        moe = architecture.text.moe
        self._moe = moe if moe is not None and moe.aux_loss_coeff else None
        self._routers = RouterTap(model)

    def forward_backward(
        self, batches: list[Batch], *, denominator: float, num_padded_tokens: int
    ) -> LossSums:
        """Gradients of one global batch."""
        self.discard()
        sums: list[Tensor] = []
        balances: list[float] = []
        for index, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(index == len(batches) - 1)  # type: ignore[operator]
            loss = self._loss(batch)
            objective = loss / denominator
            if self._moe is not None:
                balance = load_balancing_loss(self._routers.take(), batch.input_ids.shape, self._moe.topk)
                share = batch.input_ids.numel() / num_padded_tokens
                objective = objective + balance.sum() * (self._moe.aux_loss_coeff * share)
                balances.append(float(balance.detach().mean()))
            (objective * self.ranks.dp_size).backward()  # fully_shard averages over ranks
            sums.append(loss.detach().double())
        share = 1.0 / (len(batches) * self.ranks.dp_size)
        auxiliary = {"load_balancing_loss": sum(balances) * share} if balances else {}
        return dataclasses.replace(self._sums(sums, batches), auxiliary=auxiliary)

    @torch.no_grad()
    def update(self) -> UpdateResult:
        """Clip, step the optimizer and the schedule."""
        gradients = [
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = _total_norm(gradients, self.ranks.device)
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
        """Rate of parameters without a multiplier after the schedule's last step, whether or not there are any."""
        return float(self.scheduler.get_lr({}))

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
            part = part_of(name)
            counts["vision" if part == "projector" else part] += parameter.numel()
            counts["trainable"] += parameter.numel() if parameter.requires_grad else 0
        return counts

    def save(self, folder: Path, *, with_optimizer: bool, is_async: bool) -> None:
        """Write a torch DCP checkpoint."""
        state = self._state(with_optimizer=with_optimizer)
        if is_async:
            if self._saving_group is None and (self.ranks.world_size > 1 or self.ranks.device.type != "cpu"):
                # Of its own: the thread that saves talks while the step does, and each would get the other's message.
                # On the CPU: torch asks for that even of a process that is alone.
                self._saving_group = distributed.new_group(backend="gloo")
            self._pending = dcp.async_save(state, checkpoint_id=str(folder), process_group=self._saving_group)
        else:
            dcp.save(state, checkpoint_id=str(folder))

    def trace_points(self) -> dict[str, nn.Module]:
        """Modules by their common names."""
        return transformers_points(self.model)

    def gradient_scale(self, denominator: float) -> float:
        """The objective is the mean times the ranks that `fully_shard` averages over."""
        return 1.0 / self.ranks.dp_size

    def close(self) -> None:
        """Nothing holds the groups but torch itself."""

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
            self.discard()  # torch makes the states of an optimizer that has not stepped only where no gradient is left
            state["optimizer"] = dcp_state.get_optimizer_state_dict(self.model, self.optimizer)
        state["scheduler"] = self.scheduler.state_dict()
        state[f"random_{self.ranks.rank}"] = random_state.capture(self.ranks.device)
        return state

    def _loss(self, batch: Batch) -> Tensor:
        """Weighted sum of token losses of one micro-batch."""
        batch = with_blank_media(batch.to(self.ranks.device), self.architecture)
        assert batch.labels is not None
        self._routers.take()  # what an evaluation or a recomputation left
        logits = self.model(**hf_inputs(batch, self.architecture)).logits  # [b, s, v]
        token_losses = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(),
            ignore_index=IGNORED_LABEL, reduction="none",
        ).view(batch.labels.shape)  # fmt: skip
        weights, _ = loss_weights(batch, self.recipe.train.loss_reduction)
        return (token_losses * weights).sum()

    def _sums(self, sums: list[Tensor], batches: list[Batch]) -> LossSums:
        reduction = self.recipe.train.loss_reduction
        return LossSums(
            loss=float(torch.stack(sums).sum()),
            denominator=float(sum(loss_weights(batch, reduction)[1] for batch in batches)),
        )


def _total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Norm over the shards of all ranks, a float32 number on `device`.

    Only the device's own backend connects the ranks: what is offloaded cannot be added up where it lies.
    """
    shards = [part.to_local() if isinstance(part, DTensor) else part for part in gradients]
    square = nn.utils.get_total_norm(shards).to(device, torch.float64) ** 2
    distributed.all_reduce(square)
    return square.sqrt().float()


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
    check_recipe(recipe)
    ranks = start_data_parallel(recipe, launcher, timeout_s=timeout_s)
    check_optimizer(recipe, ranks.device)
    return Fsdp2Engine(recipe, architecture, ranks, build_sharded(recipe, architecture, folder, ranks))


def check_recipe(recipe: Recipe) -> None:
    """Refuse what this engine does not do.

    Raises:
        ConfigError: all such settings, named together.
    """
    offload = recipe.optimizer.cpu_offload_fraction
    refused = {
        "parallel: tensor, pipeline, context or expert parallel": recipe.parallel.model_parallel_size > 1
        or recipe.parallel.expert_model_parallel_size > 1,
        "precision.dtype = 'fp16'": recipe.precision.dtype == "fp16",
        "precision.fp8": recipe.precision.fp8 is not None,
        "precision.recompute = 'selective'": recipe.precision.recompute == "selective",
        "optimizer.use_precision_aware_optimizer": recipe.optimizer.use_precision_aware_optimizer,
        "optimizer.cpu_offload_fraction between 0 and 1": 0.0 < offload < 1.0,
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        raise ConfigError(
            "the fsdp2 engine cannot run this recipe", where=f"recipe {recipe.name}", got="; ".join(found),
            fix="change these settings, or use train.engine = 'megatron'",
        )  # fmt: skip
