# SPDX-License-Identifier: Apache-2.0
"""How a model runs: number formats, layout, recompute. What it *is* comes from the checkpoint's config."""

from dataclasses import dataclass
from typing import Literal

import torch

from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.layout import expert_ranks, has_equal_shares
from models.contract.recipe import Recipe
from models.contract.run_rules import grouped_experts_obstacles

AttentionBackend = Literal["te", "torch"]
ExpertsBackend = Literal["te", "grouped"]
TokenDispatcherType = Literal["alltoall", "allgather"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Everything about how to run a model. The defaults run anywhere: one process, fp32, torch kernels."""

    dtype: torch.dtype = torch.float32
    attention_backend: AttentionBackend = "torch"
    experts_backend: ExpertsBackend = "te"
    """`grouped`: all experts of a layer in one launch, with the `te` attention backend; `te`: those of the backend."""
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    variable_seq_lengths: bool = False
    """Micro-batches differ in length (rows padded to the longest, or packed), so pipeline stages exchange shapes."""
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    moe_token_dispatcher_type: TokenDispatcherType = "alltoall"
    """`allgather`: every rank gets all tokens once; ranks that share experts must have equally many."""
    num_layers: int | None = None
    """Keep the first so many decoder layers; None keeps all."""
    init_method_std: float = 0.02
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_num_layers: int = 1
    recompute_vision: bool = False
    fp8: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] | None = None
    freeze: tuple[Literal["language", "vision", "projector", "audio"], ...] = ()
    moe_aux_loss_coeff: float | None = None
    """Weight of the router's load-balancing loss; None takes the checkpoint's."""
    calculate_per_token_loss: bool = True
    """True: the loop divides by the number of supervised tokens after summing over all ranks and micro-batches."""
    device: str = "cpu"
    """Where parameters are made: cpu, cuda, or meta (sizes only)."""


def resolve_attention_backend(name: Literal["auto", "te", "torch"], device: str) -> AttentionBackend:
    """Turn `auto` into a backend: TransformerEngine on CUDA where it is installed, torch otherwise.

    Raises:
        ConfigError: `te` was asked for, and there is no CUDA device or no TransformerEngine.
    """
    from importlib.util import find_spec

    installed = find_spec("transformer_engine") is not None
    if name == "auto":
        return "te" if device == "cuda" and installed else "torch"
    if name == "te" and not (device == "cuda" and installed):
        raise ConfigError(
            "attention_backend 'te' cannot run here",
            where="recipe [model] attention_backend",
            expected="a CUDA device and transformer_engine",
            got=f"device {device}, transformer_engine {'installed' if installed else 'not installed'}",
            fix="use attention_backend = 'torch' or 'auto'",
        )
    return name


def resolve_experts_backend(recipe: Recipe, device: str) -> ExpertsBackend:
    """Turn `auto` into a backend: experts in one launch where there is a kernel for them, else the other one.

    Raises:
        ConfigError: `grouped` was asked for without TransformerEngine's layers, in which such experts stand.
    """
    name = recipe.model.experts_backend
    attention_backend = resolve_attention_backend(recipe.model.attention_backend, device)
    if name == "auto":
        is_open = attention_backend == "te" and not grouped_experts_obstacles(recipe)
        return "grouped" if is_open else "te"
    if name == "grouped" and attention_backend != "te":
        raise ConfigError(
            "experts_backend 'grouped' cannot run here",
            where="recipe [model] experts_backend",
            expected="attention_backend te, for which a CUDA device and transformer_engine are needed",
            got=f"attention_backend {attention_backend} on device {device}",
            fix="use experts_backend = 'te' or 'auto'",
        )
    return name


def with_experts_backend(recipe: Recipe, architecture: Architecture, device: str) -> Recipe:
    """The recipe with the backend in the place of `auto`: its checkpoints may not fit another one."""
    backend = "te" if architecture.text.moe is None else resolve_experts_backend(recipe, device)
    model = recipe.model.model_copy(update={"experts_backend": backend})
    return recipe.model_copy(update={"model": model})


def resolve_token_dispatcher(recipe: Recipe, architecture: Architecture) -> TokenDispatcherType:
    """Turn `auto` into a dispatcher: `allgather` where it has less to send and nothing stands against it.

    With n ranks that share experts and k experts a token, that sends n - 1 rows for a token, and `alltoall` up to
    k (n - 1) / n. Experts in fp8 pad their rows, and have not been tried with it.
    """
    name, moe = recipe.parallel.moe_token_dispatcher_type, architecture.text.moe
    if moe is None:
        return "alltoall"  # nothing to send; what a recipe names takes no effect, nor do reports say it
    if name != "auto":
        return name
    has_less_to_send = 1 < expert_ranks(recipe) < moe.topk
    can_gather = (
        recipe.train.engine == "megatron" and recipe.precision.fp8 is None and has_equal_shares(recipe)
    )
    return "allgather" if has_less_to_send and can_gather else "alltoall"


def with_token_dispatcher(recipe: Recipe, architecture: Architecture) -> Recipe:
    """The recipe with the dispatcher in the place of `auto`, which hangs on how many experts a token has."""
    name = resolve_token_dispatcher(recipe, architecture)
    parallel = recipe.parallel.model_copy(update={"moe_token_dispatcher_type": name})
    return recipe.model_copy(update={"parallel": parallel})


def settings_from_recipe(recipe: Recipe, *, device: str) -> ModelSettings:
    """Settings of a recipe on a kind of device (`cpu` or `cuda`).

    A dispatcher that is still `auto`, see :func:`with_token_dispatcher`, is the one that works everywhere.

    Raises:
        ConfigError: the recipe asks for something this kind of device does not have.
    """
    parallel, precision = recipe.parallel, recipe.precision
    attention_backend = resolve_attention_backend(recipe.model.attention_backend, device)
    if precision.fp8 is not None and attention_backend != "te":
        raise ConfigError(
            "fp8 needs a GPU" if device != "cuda" else "fp8 needs TransformerEngine's layers",
            where="recipe [precision] fp8",
            expected="a CUDA device with fp8 matrix products, and attention_backend te",
            got=f"device {device}, attention_backend {attention_backend}",
            fix="leave fp8 out on this machine, or pip install -e '.[gpu]', which brings transformer_engine",
        )
    return ModelSettings(
        dtype=DTYPES[precision.dtype],
        attention_backend=attention_backend,
        experts_backend=resolve_experts_backend(recipe, device),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        variable_seq_lengths=recipe.data.padding == "longest" or recipe.data.packing,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        moe_token_dispatcher_type=(
            "allgather" if parallel.moe_token_dispatcher_type == "allgather" else "alltoall"
        ),
        num_layers=recipe.model.num_layers,
        init_method_std=recipe.optimizer.init_method_std,
        recompute=precision.recompute,
        recompute_num_layers=precision.recompute_num_layers,
        recompute_vision=precision.recompute_vision,
        fp8=precision.fp8,
        freeze=recipe.model.freeze,
        device=device,
    )
