# SPDX-License-Identifier: Apache-2.0
"""The Megatron engine: mcore's schedules, data parallelism, optimizer and sharded checkpoints around our model."""

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from models.common.batch import Batch
from models.common.settings import settings_from_recipe
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.families import family_part
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.training import optimizer as optimizers
from models.training import random_state
from models.training.cpu import cpu_megatron
from models.training.engine import LossSums, UpdateResult
from models.training.gradients import gradient_square, prepare_gradients, scale_gradients
from models.training.initial_weights import load_initial_weights
from models.training.loss import loss_weights
from models.training.overlap import finish_gathers, start_gathers
from models.training.parallel import Ranks, stage_of_chunk, start_megatron
from models.training.parameters import count_parameters, parameter_order
from models.training.trace import megatron_points
from models.training.write_results import collect_write_results

OPTIMIZER_SHARDING = {"data": "dp_reshardable", "any": "fully_reshardable"}
PARAMETER_ORDER = "parameter_order"
"""Key of a checkpoint whose optimizer states lie in the order of parameters, without their names."""


class MegatronEngine:
    """See :class:`models.training.engine.Engine`."""

    def __init__(
        self, recipe: Recipe, architecture: Architecture, ranks: Ranks, patches: tuple[str, ...]
    ) -> None:
        optimizers.check_optimizer(recipe, ranks.device)
        assert ranks.groups is not None
        self.recipe = optimizers.without_idle_overlap(recipe, ranks.groups)
        self.ranks, self.patches = ranks, patches
        self.modules = build_chunks(recipe, architecture, ranks)
        self.chunks: list[Any] = []
        self.optimizer: Any = None
        self._async_calls = AsyncCallsQueue()
        collect_write_results()
        self._auxiliary_scale = 1.0
        self._denominator = 1.0
        self._square: Tensor | None = None
        """Of the gradients, launched ahead of the update."""
        self.scheduler: Any = None

    def prepare(self) -> None:
        """Wrap and build the optimizer; the weights must be in place, as main weights are copied from them."""
        assert self.ranks.groups is not None
        self.chunks = optimizers.wrap_data_parallel(self.recipe, self.modules, self.ranks.groups)
        self.optimizer = optimizers.build_optimizer(self.recipe, self.chunks, self.ranks.groups)
        self.scheduler = optimizers.build_scheduler(self.recipe, self.optimizer)
        for module in self.modules:
            _connect(module.config, self.recipe, self.chunks, self.optimizer)
            module.config.moe_grad_scale_func = self._scale_auxiliary
        # Pipeline stages run forward before they know which backward pass is the last. Ranks that share experts go back
        # together: through a frozen decoder none would that has no media, and the others would wait for it.
        shares_frozen_experts = self.ranks.layout["ep"] > 1 and "language" in self.recipe.model.freeze
        if self.ranks.layout["pp"] == 1 and not shares_frozen_experts:
            for module in self.modules[0].modules():  # the model itself, and experts that take the short way
                if hasattr(module, "are_gradients_awaited"):
                    module.are_gradients_awaited = partial(optimizers.are_gradients_awaited, self.chunks[0])

    def forward_backward(
        self, batches: list[Batch], *, denominator: float, num_padded_tokens: int
    ) -> LossSums:
        """Gradients of one global batch from this rank's micro-batches."""
        self.discard()
        self._denominator = max(denominator, 1.0)
        # The router multiplies its loss by the tokens it saw, and the update divides everything by the loss's
        # denominator: this turns the sum into a mean over the padded tokens of the global batch.
        self._auxiliary_scale = denominator / num_padded_tokens
        tracker = get_moe_metrics_tracker()
        tracker.clear()
        losses = self._run(batches, forward_only=False)
        if self.recipe.precision.dtype != "fp16":  # whose loss scale moves on as gradients are prepared
            # Launched before the loss is waited for: the device has this to do while the CPU goes on to the update.
            self._square = self._gradient_square()
        sums = _loss_sums(losses)
        count = len(batches) * self.ranks.dp_size * _num_moe_layers(self.modules[0].config)
        metrics = tracker.metrics if count else {}  # which keep the names of a model that was here before
        auxiliary = {name: float(entry.values.sum()) / count for name, entry in metrics.items()}
        return dataclasses.replace(sums, auxiliary=auxiliary)

    @torch.no_grad()
    def update(self) -> UpdateResult:
        """Clip, step the optimizer and the schedule."""
        loss_scale = float(self.optimizer.get_loss_scale())
        square = self._gradient_square() if self._square is None else self._square
        self._square = None
        scale = 1.0 / self._denominator
        grad_norm = math.nan if square is None else scale * math.sqrt(float(square))
        is_updated = math.isfinite(grad_norm)
        if is_updated:
            scale_gradients(self.optimizer, scale, grad_norm)
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(1)
        return UpdateResult(
            is_updated=is_updated,
            grad_norm=grad_norm,
            learning_rate=self.learning_rate(),
            loss_scale=loss_scale,
            is_overflow=square is None,
        )

    def learning_rate(self) -> float:
        """Rate of parameters without a multiplier after the schedule's last step, whether or not there are any."""
        return float(self.scheduler.get_lr({}))

    def discard(self) -> None:
        """Drop the gradients of this step."""
        self._square = None
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def evaluate(self, batches: list[Batch]) -> LossSums:
        """Loss sums of held-out micro-batches."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            losses = self._run(batches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return _loss_sums(losses)

    def num_parameters(self) -> dict[str, int]:
        """Parameters of the whole model by part."""
        return count_parameters(self.modules, self.ranks)

    def save(self, folder: Path, *, with_optimizer: bool, is_async: bool) -> None:
        """Write a sharded torch_dist checkpoint; model keys are those of a converted checkpoint."""
        self._gather_weights()
        state = self._sharded_state(with_optimizer=with_optimizer, is_loading=False)
        if with_optimizer and self.recipe.checkpoint.resharding == "data":
            state[PARAMETER_ORDER] = parameter_order(self.modules, self.ranks)
        request = dist_checkpointing.save(
            state, str(folder), async_sharded_save=is_async, async_strategy="mcore"
        )
        if request is not None:
            self._async_calls.schedule_async_request(request)

    def trace_points(self) -> dict[str, Any]:
        """Modules of this rank by their common names."""
        return megatron_points(self.modules)

    def gradient_scale(self, denominator: float) -> float:
        """Losses are summed and scaled; gradients of parameters are divided later."""
        return 1.0 / (denominator * float(self.optimizer.get_loss_scale()))

    def is_save_finished(self, *, is_blocking: bool) -> bool:
        """Whether the background writer of every rank is done."""
        self._async_calls.maybe_finalize_async_calls(blocking=is_blocking)
        return self._async_calls.get_num_unfinalized_calls() == 0

    def close(self) -> None:
        """Empty the wrappers: their hooks hang on gradient nodes, a circle that Python's collector does not see."""
        for chunk in self.chunks:
            vars(chunk).clear()

    @torch.no_grad()
    def load(self, folder: Path, *, with_optimizer: bool, same_layout: bool) -> None:
        """Read what :meth:`save` wrote, in place.

        Raises:
            ConfigError: the optimizer's states lie in another order than this model's parameters.
        """
        if with_optimizer:
            self._require_order(folder)
        state = self._sharded_state(with_optimizer=with_optimizer, is_loading=True)
        if not same_layout:
            del state["random"]  # there is one of each rank that was
        strict = StrictHandling.RAISE_UNEXPECTED  # what is asked for and not there
        loaded: Any = dist_checkpointing.load(state, str(folder), strict=strict)
        for name, module in self._named_modules():
            module.load_state_dict(loaded[name])
        if with_optimizer:
            optimizers.load_states(self.optimizer, loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            random_state.restore(loaded["random"], self.ranks.device)

    def _require_order(self, folder: Path) -> None:
        order = parameter_order(self.modules, self.ranks)
        found = dist_checkpointing.load_common_state_dict(str(folder)).get(PARAMETER_ORDER, order)
        if found != order:
            raise ConfigError(
                "the checkpoint's optimizer states are of parameters in another order", where=str(folder),
                expected=f"{order}, names and shapes of this model's in their order", got=str(found),
                fix="go on with the version of this program that wrote it, or convert its weights and start a new run",
            )  # fmt: skip

    @torch.no_grad()
    def _gather_weights(self) -> None:
        """Bring the weights up to date that other data-parallel ranks stepped.

        Where that overlaps with the forward pass it would come with the next training step only: until then a rank has
        old values for all but its own share.
        """
        if self.recipe.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _named_modules(self) -> list[tuple[str, Any]]:
        if len(self.modules) == 1:
            return [("model", self.modules[0])]
        return [(f"model{index}", module) for index, module in enumerate(self.modules)]

    def _sharded_state(self, *, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
        assert self.ranks.groups is not None
        metadata = {
            "distrib_optim_sharding_type": OPTIMIZER_SHARDING[self.recipe.checkpoint.resharding],
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": self.ranks.groups.dp_cp,
        }
        models = {
            name: module.sharded_state_dict(metadata=metadata) for name, module in self._named_modules()
        }
        state: dict[str, Any] = dict(models)
        if with_optimizer:
            optimizers.allocate_states(self.optimizer)
            whole = models["model"] if len(models) == 1 else models
            state["optimizer"] = self.optimizer.sharded_state_dict(
                whole, is_loading=is_loading, metadata=metadata
            )
        state["scheduler"] = self.scheduler.state_dict()
        state["random"] = ShardedObject(
            "random", random_state.capture(self.ranks.device), (self.ranks.world_size,), (self.ranks.rank,)
        )
        return state

    def _gradient_square(self) -> Tensor | None:
        """Prepare the main gradients and sum their squares; None after an overflow."""
        if prepare_gradients(self.optimizer):
            return None
        return gradient_square(self.optimizer, self.ranks.device)

    def _scale_auxiliary(self) -> Tensor:
        return self.optimizer.scale_loss(torch.full((), self._auxiliary_scale, device=self.ranks.device))

    def _run(self, batches: list[Batch], *, forward_only: bool) -> list[tuple[Tensor, float]]:
        """Loss sum and denominator of every micro-batch, without a wait for the device; none but on the last stage."""
        schedule = get_forward_backward_func()
        start_gathers(self.chunks)
        losses: list[tuple[Tensor, float]] = schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.recipe.data.seq_length,
            micro_batch_size=batches[0].input_ids.shape[0],
            forward_only=forward_only,
        )
        finish_gathers(self.chunks)
        return losses

    def _forward_step(self, batches: Any, model: Any) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.ranks.device)
        output = model(batch)

        def loss_function(token_losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, float]]:
            weights, denominator = loss_weights(batch, self.recipe.train.loss_reduction)
            # Every context-parallel rank has the whole row, zeros where another has the token.
            loss = (token_losses.float() * weights).sum()
            share = denominator if self.ranks.cp_rank == 0 else 0
            # Filled on the device: a number that is copied there waits for it.
            num_tokens = torch.full((), share, dtype=torch.int, device=loss.device)
            # The schedule scales the loss in place: what is reported must be a copy.
            return loss, num_tokens, (loss.detach().double(), float(share))

        return output, loss_function


def device_patches() -> AbstractContextManager[tuple[str, ...]]:
    """What must be in force while the engine runs on this machine: nothing where there is a GPU."""
    return nullcontext(()) if torch.cuda.is_available() else cpu_megatron()


def start_engine(
    recipe: Recipe,
    architecture: Architecture,
    folder: Path,
    launcher: LauncherEnvironment,
    *,
    timeout_s: float,
    patches: tuple[str, ...],
) -> MegatronEngine:
    """Start the groups, build the model, fill it from the checkpoint (or at random) and make the optimizer."""
    ranks = start_megatron(recipe, launcher, timeout_s=timeout_s)
    engine = MegatronEngine(recipe, architecture, ranks, patches)
    if recipe.model.init == "checkpoint":
        load_initial_weights(engine.modules, folder, num_layers=recipe.model.num_layers)
    engine.prepare()
    return engine


def build_chunks(recipe: Recipe, architecture: Architecture, ranks: Ranks) -> list[Any]:
    """The model chunks of this rank: one, or one for each virtual pipeline stage."""
    build_model = family_part(architecture.family, "model").build_model
    settings = settings_from_recipe(recipe, device=ranks.device.type)
    chunks = []
    for index in range(ranks.layout["vpp"]):
        is_first, is_last = stage_of_chunk(index, ranks)
        vp_stage = index if ranks.layout["vpp"] > 1 else None
        chunks.append(
            build_model(
                architecture, settings, groups=ranks.groups,
                pre_process=is_first, post_process=is_last, vp_stage=vp_stage,
            ).to(ranks.device)
        )  # fmt: skip
    return chunks


def _loss_sums(losses: list[tuple[Tensor, float]]) -> LossSums:
    """Waits for the device."""
    if not losses:
        return LossSums()
    return LossSums(
        loss=float(torch.stack([loss for loss, _ in losses]).sum()),
        denominator=sum(denominator for _, denominator in losses),
    )


def _num_moe_layers(config: Any) -> int:
    return sum(config.moe_layer_freq) if config.num_moe_experts else 0


def _sum_gradients(chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Sums over all ranks: the update divides them as it clips, with one pass over all gradients instead of two."""
    finalize_model_grads(chunks, None, **kwargs)


def _connect(config: Any, recipe: Recipe, chunks: list[Any], optimizer: Any) -> None:
    """Tell mcore's schedules what to call; without `finalize_model_grads` tensor-parallel ranks drift apart."""
    config.calculate_per_token_loss = True
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = _sum_gradients
    if recipe.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
