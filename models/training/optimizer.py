# SPDX-License-Identifier: Apache-2.0
"""Data parallelism, AdamW and the schedule, all of them Megatron's, set up from a recipe."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from models.common.settings import DTYPES
from models.contract.errors import ConfigError
from models.contract.recipe import OptimizerSection, Recipe
from models.training.adamw_steps import step_short_states, step_whole_states
from models.training.overlap import exchange_in_turn

PROJECTOR_PARTS = ("vision_model.merger.", "vision_model.deepstack_mergers.")


def is_projector(name: str) -> bool:
    """Whether a Megatron parameter belongs to the merger or a deepstack merger."""
    return any(part in name for part in PROJECTOR_PARTS)


def is_vision_tower(name: str) -> bool:
    """Whether a Megatron parameter belongs to the vision tower without its mergers."""
    return "vision_model." in name and not is_projector(name)


def without_idle_overlap(recipe: Recipe, groups: ProcessGroupCollection) -> Recipe:
    """The recipe without overlapped exchanges where there is nobody to exchange with.

    They would cost a hook at every module and every parameter: 7% of the CPU's time in a step that waits for launches.
    """
    if groups.dp_cp.size() > 1 or groups.expt_dp.size() > 1:
        return recipe
    parallel = recipe.parallel.model_copy(
        update={"overlap_grad_reduce": False, "overlap_param_gather": False}
    )
    return recipe.model_copy(update={"parallel": parallel})


def wrap_data_parallel(
    recipe: Recipe, chunks: list[Any], groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Wrap every model chunk of this rank in Megatron's data parallelism."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        align_param_gather=recipe.parallel.overlap_param_gather,  # by overlap.start_gathers
        use_distributed_optimizer=recipe.optimizer.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=config,
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    fuse_weight_gradients(wrapped)
    for chunk in wrapped:
        exchange_in_turn(chunk)
    return wrapped


def fuse_weight_gradients(chunks: Iterable[torch.nn.Module]) -> int:
    """Let TransformerEngine's linear layers add their gradient to the main one in the matrix product itself.

    Set on the layers, once data parallelism has given them a main gradient. megatron-core's own option would also ask
    for it in its plain layers, which need a CUDA extension that no package offers.

    Returns: How many layers it was set on; none without TransformerEngine.
    """
    layers = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(layers)


def are_gradients_awaited(chunk: Any) -> bool:
    """Whether data parallelism waits for a gradient of every parameter of a chunk in this micro-batch.

    Only where the exchange of gradients overlaps with the backward pass, and so only in the last one of a step.
    """
    groups = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
    return chunk.ddp_config.overlap_grad_reduce and any(group.is_last_microbatch for group in groups)


def check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Refuse what this kind of device cannot do.

    Raises:
        ConfigError: precision-aware states without TransformerEngine, offload from a CPU to a CPU, or overlap
            options without what they overlap.
    """
    settings, parallel = recipe.optimizer, recipe.parallel
    where = f"recipe {recipe.name}: [optimizer]"
    if device.type != "cuda" and settings.use_precision_aware_optimizer:
        raise ConfigError(
            "use_precision_aware_optimizer needs TransformerEngine's AdamW",
            where=where,
            expected="a CUDA device",
            got=device.type,
            fix="set it to false on this machine",
        )
    if settings.use_precision_aware_optimizer and not settings.use_distributed_optimizer:
        raise ConfigError(
            "use_precision_aware_optimizer needs use_distributed_optimizer",
            where=where,
            fix="set use_distributed_optimizer = true",
        )
    if device.type == "cpu" and settings.cpu_offload_fraction > 0:
        raise ConfigError(
            "cpu_offload_fraction has no effect on a CPU",
            where=where,
            got=f"cpu_offload_fraction = {settings.cpu_offload_fraction}",
            fix="set it to 0 on this machine",
        )
    if settings.min_lr > settings.lr:
        raise ConfigError("min_lr is larger than lr", where=where, got=f"{settings.min_lr} > {settings.lr}")
    if settings.lr_warmup_iters >= recipe.lr_decay_iters:
        raise ConfigError(
            "warmup does not end before the decay does",
            where=where,
            expected=f"lr_warmup_iters < {recipe.lr_decay_iters}",
            got=str(settings.lr_warmup_iters),
        )
    if parallel.overlap_param_gather and not (
        parallel.overlap_grad_reduce and settings.use_distributed_optimizer
    ):
        raise ConfigError(
            "overlap_param_gather needs overlap_grad_reduce and use_distributed_optimizer",
            where=f"recipe {recipe.name}: [parallel]",
            fix="switch both on, or overlap_param_gather off",
        )


def build_optimizer(
    recipe: Recipe, chunks: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW over the trainable parameters: no decay on biases and norms, learning rates per part."""
    settings = recipe.optimizer
    dtype = DTYPES[recipe.precision.dtype]
    is_offloaded = settings.cpu_offload_fraction > 0
    # mcore's offloading optimizer keeps fp32 weights and moments itself. Without the precision-aware mode a second
    # fp32 copy of the weights would stay on the device, and its states could not be read back.
    is_precision_aware = settings.use_precision_aware_optimizer or is_offloaded
    has_short_moments = settings.use_precision_aware_optimizer and not is_offloaded
    moment_dtype = torch.bfloat16 if has_short_moments else torch.float32
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        fp16=dtype is torch.float16,
        bf16=dtype is torch.bfloat16,
        initial_loss_scale=2.0**16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        optimizer_cpu_offload=is_offloaded,
        optimizer_offload_fraction=settings.cpu_offload_fraction,
        use_precision_aware_optimizer=is_precision_aware,
        exp_avg_dtype=moment_dtype,
        exp_avg_sq_dtype=moment_dtype,
    )
    overrides = get_standard_config_overrides(config) | _learning_rate_overrides(settings)
    optimizer = get_megatron_optimizer(
        config, [*chunks], config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    for part in cast(Any, optimizer).chained_optimizers:
        if part.is_stub_optimizer:
            continue
        if has_short_moments:
            step_short_states(part.optimizer)
        elif settings.use_distributed_optimizer and _is_fused_adam(part.optimizer):
            step_whole_states(part)
    return optimizer


def _is_fused_adam(inner: Any) -> bool:
    """Whether this is TransformerEngine's AdamW, which megatron-core takes where it is installed."""
    return type(inner).__module__.startswith("transformer_engine.")


def allocate_states(optimizer: Any) -> None:
    """Make torch AdamW's states where it has not stepped yet: before a checkpoint is loaded into them, or written.

    mcore reads the common `step` out of them to describe them, and so wants one where a stage has nothing to train;
    TransformerEngine's AdamW keeps its step elsewhere and needs none of this.
    """
    for part in optimizer.chained_optimizers:
        inner = None if part.is_stub_optimizer else part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states: Any = inner.state
        if not states:
            states["no parameter"] = {"step": torch.zeros((), dtype=torch.float32)}


def load_states(optimizer: Any, state: dict[Any, Any]) -> None:
    """Give the parts of an optimizer what a checkpoint holds for them.

    Another layout may have had other parts: experts have one of their own under expert parallelism only. All parts are
    equally old, and what else describes their groups follows from the recipe: the fully reshardable format needs no
    more from the parts that were than their step and their loss scale.

    Two things of mcore 0.19 are worked around for torch AdamW: loading shares one `step` tensor among all
    parameters, which then counts once for each of them, and the fully reshardable format has no `step` to copy.
    """
    parts = optimizer.chained_optimizers
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    before = state if "optimizer" in state else state.get(0, {})  # the first part that was, if it had several
    for part, saved in zip(parts, states, strict=True):
        if part.is_stub_optimizer:
            continue
        if before.get("param_state_sharding_type") == "fully_reshardable":
            saved = saved | _as_groups_of(part, before)
        if not isinstance(part.optimizer, torch.optim.AdamW) or "param_state" not in saved:
            part.load_state_dict(saved)
            if isinstance(part.optimizer, HybridDeviceOptimizer):
                settle_offloaded(part.optimizer)
            continue
        part.load_state_dict({key: value for key, value in saved.items() if key != "param_state"})
        steps = {key: values.pop("step") for key, values in part.optimizer.state.items()}
        load_parameters = {
            "dp_reshardable": part.load_parameter_state_from_dp_reshardable,
            "fully_reshardable": part.load_parameter_state_from_fully_reshardable,
        }[saved["param_state_sharding_type"]]
        load_parameters(saved["param_state"])
        for key, step in steps.items():
            part.optimizer.state[key]["step"] = step.clone()


def settle_offloaded(inner: HybridDeviceOptimizer) -> None:
    """Hand loaded states on to the optimizers inside, of the CPU and of the device.

    mcore 0.19 does not where states lie as `checkpoint.resharding = "data"` has them: the fp32 weights stayed those
    that the model was built with, and the next step put them into the model. What it takes for the loaded step of torch
    AdamW is then its own, from before. And it leaves the loaded `step` in the outer groups, from where every step would
    set TransformerEngine's count back to it.
    """
    steps = [group.pop("step") for group in inner.param_groups if "step" in group]
    if steps:
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps[0]))
    inner._sync_hdo_state_to_sub_optimizers()


def _as_groups_of(part: Any, before: dict[Any, Any]) -> dict[str, Any]:
    """What belongs to no parameter in the state of a part that was, for the parameter groups of one that is."""
    steps = [group["step"] for group in before["optimizer"]["param_groups"] if "step" in group]
    age = {"step": steps[0]} if steps else {}
    groups = [group | age for group in part.state_dict()["optimizer"]["param_groups"]]
    kept = {key: before[key] for key in ("param_state_sharding_type", "grad_scaler") if key in before}
    return kept | {"optimizer": {"param_groups": groups}}


def build_scheduler(recipe: Recipe, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in iterations.

    The first iteration runs at the rate of step 0: zero under warmup, as in Megatron-LM.
    """
    settings = recipe.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=recipe.lr_decay_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=recipe.train.train_iters,
        wd_incr_style="constant",
    )


def _learning_rate_overrides(settings: OptimizerSection) -> dict[ParamKey, ParamGroupOverride]:
    parts: tuple[tuple[str, Callable[[str], bool], float], ...] = (
        ("vision", is_vision_tower, settings.vision_lr_mult),
        ("projector", is_projector, settings.projector_lr_mult),
    )
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    for label, belongs, multiplier in parts:
        if multiplier != 1.0:
            predicate = ParamWithNamePredicate(name=label, fn=lambda _, name, test=belongs: test(name))
            overrides[ParamKey(with_name_predicate=predicate)] = ParamGroupOverride(
                max_lr=settings.lr * multiplier, min_lr=settings.min_lr * multiplier
            )
    return overrides
