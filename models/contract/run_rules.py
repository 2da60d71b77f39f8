# SPDX-License-Identifier: Apache-2.0
"""Rules about settings that contradict each other, whatever the model: batches, optimizer, engine, kind of device.

The programs that run a recipe check them again where they act on them; here they are known before anything starts.
"""

from collections.abc import Iterator

from models.contract.fixed_shapes import check_fixed_shapes
from models.contract.layout_problem import LayoutProblem
from models.contract.recipe import Recipe


def check_run(recipe: Recipe, *, hardware: str | None = None) -> list[LayoutProblem]:
    """Every rule that the recipe breaks by itself.

    Args:
        recipe: What would run.
        hardware: Hardware class it would run on; None leaves the rules about devices out.
    """
    problems = [
        *_batches(recipe), *check_fixed_shapes(recipe), *_recompute(recipe), *_evaluation(recipe),
        *_optimizer(recipe), *_fp8(recipe), *_grouped_experts(recipe), *_fsdp2(recipe),
    ]  # fmt: skip
    return [*problems, *_cpu(recipe)] if hardware == "cpu" else problems


def _batches(recipe: Recipe) -> Iterator[LayoutProblem]:
    data = recipe.data
    if data.packing and recipe.train.micro_batch_size != 1:
        yield LayoutProblem(
            rule="a pack is a micro-batch of its own", where="train.micro_batch_size",
            got=f"{recipe.train.micro_batch_size} with data.packing",
            fix="set it to 1; data.seq_length is the size of a pack",
        )  # fmt: skip
    if data.vision_tokens_per_pack is not None and not data.packing:
        yield LayoutProblem(
            rule="a vision-token budget is one of packs", where="data.vision_tokens_per_pack",
            got=f"{data.vision_tokens_per_pack} without data.packing", fix="set data.packing = true, or leave it out",
        )  # fmt: skip
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        yield LayoutProblem(
            rule="min_pixels must not be above max_pixels", where="data.min_pixels",
            got=f"{data.min_pixels} and {data.max_pixels}", fix="exchange them",
        )  # fmt: skip


def _recompute(recipe: Recipe) -> Iterator[LayoutProblem]:
    precision = recipe.precision
    if precision.recompute_num_layers != 1 and precision.recompute != "full":
        yield LayoutProblem(
            rule="layers are recomputed together in full recompute only", where="precision.recompute_num_layers",
            got=f"{precision.recompute_num_layers} with recompute = {precision.recompute}",
            fix="set precision.recompute = 'full', or leave it out",
        )  # fmt: skip


def _evaluation(recipe: Recipe) -> Iterator[LayoutProblem]:
    interval, samples = recipe.train.eval_interval, recipe.train.eval_samples
    if interval is not None and not samples:
        yield LayoutProblem(
            rule="an evaluation needs samples", where="train.eval_samples", got=f"0 with eval_interval = {interval}",
            fix="say how many held-out samples, or leave eval_interval out",
        )  # fmt: skip
    per_call = recipe.train.micro_batch_size * recipe.data_parallel_size
    if samples % per_call:  # another layout would be held to other samples
        yield LayoutProblem(
            rule="eval_samples must be a multiple of micro_batch_size * data_parallel_size", where="train.eval_samples",
            got=f"{samples} and {per_call}", fix=f"use {-(-samples // per_call) * per_call}",
        )  # fmt: skip
    if interval is None and (samples or recipe.data.eval_dataset):
        yield LayoutProblem(
            rule="held-out samples are for evaluations", where="train.eval_interval",
            got=f"none with eval_samples = {samples}, eval_dataset = {recipe.data.eval_dataset}",
            fix="set it, or leave the others out",
        )  # fmt: skip


def _optimizer(recipe: Recipe) -> Iterator[LayoutProblem]:
    settings, parallel = recipe.optimizer, recipe.parallel
    if settings.min_lr > settings.lr:
        yield LayoutProblem(
            rule="min_lr must not be above lr", where="optimizer.min_lr", got=f"{settings.min_lr} and {settings.lr}",
            fix="lower it",
        )  # fmt: skip
    multipliers = {"vision": settings.vision_lr_mult, "projector": settings.projector_lr_mult}
    for group, multiplier in multipliers.items():
        if multiplier != 1.0 and group in recipe.model.freeze:
            yield LayoutProblem(
                rule="a frozen group has no learning rate to multiply", where=f"optimizer.{group}_lr_mult",
                got=f"{multiplier} with model.freeze = {', '.join(recipe.model.freeze)}", fix="leave it out",
            )  # fmt: skip
    if settings.lr_warmup_iters >= recipe.lr_decay_iters:
        yield LayoutProblem(
            rule="the warm-up must end before the decay does", where="optimizer.lr_warmup_iters",
            got=f"{settings.lr_warmup_iters} of {recipe.lr_decay_iters} iterations",
            fix=f"use less than {recipe.lr_decay_iters}",
        )  # fmt: skip
    needs_distributed_optimizer = {
        "use_precision_aware_optimizer": settings.use_precision_aware_optimizer,
        "cpu_offload_fraction": settings.cpu_offload_fraction > 0 and recipe.train.engine == "megatron",
    }
    for name, is_set in needs_distributed_optimizer.items():
        if is_set and not settings.use_distributed_optimizer:
            yield LayoutProblem(
                rule=f"{name} needs use_distributed_optimizer", where=f"optimizer.{name}",
                got="use_distributed_optimizer = false", fix="set use_distributed_optimizer = true",
            )  # fmt: skip
    if (
        settings.cpu_offload_fraction > 0
        and recipe.precision.dtype == "fp32"
        and recipe.train.engine == "megatron"
    ):
        yield LayoutProblem(
            rule="cpu_offload_fraction moves the fp32 copies of 16-bit weights, and fp32 weights have none",
            where="optimizer.cpu_offload_fraction", got="precision.dtype = fp32", fix="set it to 0, or use bf16",
        )  # fmt: skip
    overlapped = parallel.overlap_grad_reduce and settings.use_distributed_optimizer
    if parallel.overlap_param_gather and not overlapped:
        yield LayoutProblem(
            rule="overlap_param_gather needs overlap_grad_reduce and use_distributed_optimizer",
            where="parallel.overlap_param_gather",
            got=f"{parallel.overlap_grad_reduce} and {settings.use_distributed_optimizer}".lower(),
            fix="switch both on, or overlap_param_gather off",
        )  # fmt: skip


def _fp8(recipe: Recipe) -> Iterator[LayoutProblem]:
    fp8, backend = recipe.precision.fp8, recipe.model.attention_backend
    if fp8 is not None and backend == "torch":
        yield LayoutProblem(
            rule="layers of the torch backend have no fp8 products", where="model.attention_backend",
            got=f"torch with precision.fp8 = {fp8}", fix="use 'te' or 'auto', or leave fp8 out",
        )  # fmt: skip


def grouped_experts_obstacles(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Settings with which experts do not run in one launch: what each is, and what it would have to be."""
    parallel, precision, engine = recipe.parallel, recipe.precision, recipe.train.engine
    etp = parallel.expert_tensor_size
    without = {
        "train.engine": (engine != "megatron", engine, "use engine = 'megatron'"),
        "model.attention_backend": (recipe.model.attention_backend == "torch", "torch", "use 'te' or 'auto'"),
        "precision.dtype": (precision.dtype != "bf16", precision.dtype, "use bf16"),
        "precision.fp8": (precision.fp8 is not None, str(precision.fp8), "leave it out"),
        "parallel.expert_tensor_parallel_size": (etp > 1, str(etp), "set it to 1"),
    }
    return {where: (got, fix) for where, (is_set, got, fix) in without.items() if is_set}


def _grouped_experts(recipe: Recipe) -> Iterator[LayoutProblem]:
    if recipe.model.experts_backend != "grouped":
        return
    for where, (got, fix) in grouped_experts_obstacles(recipe).items():
        yield LayoutProblem(
            rule="experts in one launch are those of the te backend in bf16, each whole on a rank", where=where,
            got=f"{got} with model.experts_backend = grouped", fix=f"{fix}, or experts_backend = 'te'",
        )  # fmt: skip


def _fsdp2(recipe: Recipe) -> Iterator[LayoutProblem]:
    if recipe.train.engine != "fsdp2":
        return
    parallel, precision, optimizer = recipe.parallel, recipe.precision, recipe.optimizer
    if max(parallel.model_parallel_size, parallel.expert_model_parallel_size) > 1:
        yield LayoutProblem(
            rule="the fsdp2 engine splits over data-parallel ranks only", where="train.engine",
            got=f"tp * pp * cp = {parallel.model_parallel_size}, ep = {parallel.expert_model_parallel_size}",
            fix="use engine = 'megatron'",
        )  # fmt: skip
    unsupported = {
        "precision.dtype": (precision.dtype == "fp16", "fp16"),
        "precision.fp8": (precision.fp8 is not None, str(precision.fp8)),
        "precision.recompute": (precision.recompute == "selective", "selective"),
        "parallel.moe_token_dispatcher_type": (parallel.moe_token_dispatcher_type == "allgather", "allgather"),
        "precision.recompute_num_layers": (
            precision.recompute_num_layers != 1, str(precision.recompute_num_layers)
        ),
        "optimizer.use_precision_aware_optimizer": (optimizer.use_precision_aware_optimizer, "true"),
        "optimizer.cpu_offload_fraction": (
            0.0 < optimizer.cpu_offload_fraction < 1.0, str(optimizer.cpu_offload_fraction)
        ),
    }  # fmt: skip
    for where, (is_set, got) in unsupported.items():
        if is_set:
            yield LayoutProblem(
                rule="the fsdp2 engine does not do this", where=where, got=got,
                fix="change it, or use engine = 'megatron'",
            )  # fmt: skip


def _cpu(recipe: Recipe) -> Iterator[LayoutProblem]:
    precision, optimizer = recipe.precision, recipe.optimizer
    needs_gpu = {
        "precision.fp8": (precision.fp8 is not None, str(precision.fp8), "leave it out"),
        "model.attention_backend": (recipe.model.attention_backend == "te", "te", "use 'torch' or 'auto'"),
        "model.experts_backend": (recipe.model.experts_backend == "grouped", "grouped", "leave it out"),
        "optimizer.use_precision_aware_optimizer": (
            optimizer.use_precision_aware_optimizer, "true", "set it to false"
        ),
        "optimizer.cpu_offload_fraction": (
            optimizer.cpu_offload_fraction > 0, str(optimizer.cpu_offload_fraction), "set it to 0"
        ),
    }  # fmt: skip
    for where, (is_set, got, fix) in needs_gpu.items():
        if is_set:
            yield LayoutProblem(rule="this needs a GPU", where=where, got=f"{got} on cpu", fix=fix)
