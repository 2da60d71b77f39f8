# SPDX-License-Identifier: Apache-2.0
"""Whether a model can run in the layout that a recipe asks for: every broken rule, found before anything starts.

Torch-free, so that planning on a laptop refuses what a GPU node would refuse an hour later.
"""

from collections.abc import Iterator

from models.contract.architecture import Architecture, TextArchitecture
from models.contract.errors import ConfigError
from models.contract.fixed_shapes import check_fixed_images
from models.contract.layout_problem import LayoutProblem
from models.contract.recipe import Recipe
from models.contract.run_rules import check_run


def check_layout(
    architecture: Architecture, recipe: Recipe, *, hardware: str | None = None
) -> list[LayoutProblem]:
    """Every rule that the recipe breaks for this model; empty when it can run.

    Args:
        architecture: The model.
        recipe: What would run.
        hardware: Hardware class it would run on; None leaves the rules about devices out.
    """
    return [
        *_tensor_parallel(architecture, recipe),
        *_pipeline(architecture, recipe),
        *_virtual_pipeline(architecture, recipe),
        *_sequence(recipe),
        *check_fixed_images(architecture.vision, recipe),
        *_experts(architecture, recipe),
        *_fp8(architecture, recipe),
        *_other(architecture, recipe),
        *check_run(recipe, hardware=hardware),
    ]


def require_layout(architecture: Architecture, recipe: Recipe) -> None:
    """Raise one ConfigError with every rule that the layout breaks; do nothing when it can run."""
    problems = check_layout(architecture, recipe)
    if problems:
        raise ConfigError(
            f"this model cannot run in this layout: {len(problems)} rule(s) broken",
            where=f"recipe {recipe.name}",
            got="; ".join(str(problem) for problem in problems),
            fix="change the keys named above",
        )


def sequence_multiple(recipe: Recipe) -> int:
    """What the length of every row must be a multiple of; under packing with context parallelism, of every sample."""
    parallel = recipe.parallel
    cp = parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return 1 if cp == tp == 1 else cp * (tp if cp == 1 else _least_common_multiple(tp, 2))


def expert_ranks(recipe: Recipe) -> int:
    """Ranks that share the experts of a layer, and send each other tokens."""
    return recipe.parallel.expert_tensor_size * recipe.parallel.expert_model_parallel_size


def has_equal_shares(recipe: Recipe) -> bool:
    """Whether ranks that share experts are certain to have equally many tokens in every micro-batch.

    They stand one behind another, as those do that have parts of the same rows, cut evenly: only data-parallel ranks
    can have rows of another length, and only where those follow from the samples.
    """
    parallel = recipe.parallel
    same_rows = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return recipe.data.padding == "max_length" or same_rows % expert_ranks(recipe) == 0


def _least_common_multiple(a: int, b: int) -> int:
    return a if a % b == 0 else a * b


def _divides(
    number: int, total: int, what: str, key: str, *, fix: str = "choose a divisor"
) -> Iterator[LayoutProblem]:
    if total % number:
        name = key.rpartition(".")[2]
        yield LayoutProblem(
            rule=f"{what} must be a multiple of {name}", where=key, got=f"{total} and {number}", fix=fix
        )


def _tensor_parallel(architecture: Architecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    key, tp = "parallel.tensor_model_parallel_size", recipe.parallel.tensor_model_parallel_size
    text, vision = architecture.text, architecture.vision
    numbers = {
        "the decoder's num_attention_heads": text.num_attention_heads,
        "the decoder's num_query_groups": text.num_query_groups,
        "the decoder's vocab_size": text.vocab_size,
        "the vision tower's num_attention_heads": vision.num_attention_heads,
        "the vision tower's ffn_hidden_size": vision.ffn_hidden_size,
        "the merger's width": vision.hidden_size * vision.spatial_merge_size**2,
    }
    if text.moe is None or text.moe.dense_layers:
        numbers["the decoder's ffn_hidden_size"] = text.ffn_hidden_size
    for what, number in numbers.items():
        yield from _divides(tp, number, what, key)
    if recipe.parallel.sequence_parallel and tp == 1:
        yield LayoutProblem(
            rule="sequence_parallel splits the sequence over the tensor-parallel ranks and needs at least two",
            where="parallel.sequence_parallel", got="tensor_model_parallel_size = 1", fix="set it to false",
        )  # fmt: skip
    if text.moe is not None and tp > 1 and not recipe.parallel.sequence_parallel:
        yield LayoutProblem(
            rule="a mixture of experts with tensor parallelism needs sequence_parallel",
            where="parallel.sequence_parallel", got="false", fix="set it to true",
        )  # fmt: skip


def _num_layers(text: TextArchitecture, recipe: Recipe) -> int:
    return recipe.model.num_layers or text.num_layers


def _pipeline(architecture: Architecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    parallel, layers = recipe.parallel, _num_layers(architecture.text, recipe)
    pp = parallel.pipeline_model_parallel_size
    ends = {
        "parallel.num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "parallel.num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
    }
    named = {key: count for key, count in ends.items() if count is not None}
    for key, count in named.items():
        if pp == 1 or count < 1:
            yield LayoutProblem(
                rule="an uneven stage needs a pipeline and at least one layer", where=key,
                got=f"{count} layers, pipeline_model_parallel_size = {pp}", fix="leave it out",
            )  # fmt: skip
            return
    middle, rest = pp - len(named), layers - sum(named.values())
    is_even = rest == 0 if middle == 0 else rest > 0 and rest % middle == 0
    if not is_even:
        yield LayoutProblem(
            rule="the layers that first and last stage leave must divide over the other stages",
            where="parallel.pipeline_model_parallel_size",
            got=f"{rest} of {layers} layers, {middle} of {pp} stages",
            fix="set num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage",
        )


def _stages(architecture: Architecture, recipe: Recipe) -> list[int]:
    """Layers of every stage; assumes that they divide."""
    parallel, layers = recipe.parallel, _num_layers(architecture.text, recipe)
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    pp = parallel.pipeline_model_parallel_size
    middle = pp - (first is not None) - (last is not None)
    each = (layers - (first or 0) - (last or 0)) // max(middle, 1)
    return [
        *([] if first is None else [first]),
        *[each] * middle,
        *([] if last is None else [last]),
    ]


def _virtual_pipeline(architecture: Architecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    parallel = recipe.parallel
    vpp, pp = parallel.virtual_pipeline_model_parallel_size, parallel.pipeline_model_parallel_size
    key = "parallel.virtual_pipeline_model_parallel_size"
    if vpp is None:
        return
    if pp == 1:
        yield LayoutProblem(rule="virtual stages need a pipeline", where=key, got="pipeline_model_parallel_size = 1",
                            fix="leave it out")  # fmt: skip
        return
    stages = _stages(architecture, recipe)
    for count in sorted(set(stages)):
        yield from _divides(vpp, count, "the number of layers of a stage", key)
    batches = {"global_batch_size": recipe.num_microbatches, "eval_samples": recipe.num_eval_microbatches}
    for name, count in batches.items():
        if count % pp:
            yield LayoutProblem(
                rule="the number of micro-batches must be a multiple of pipeline_model_parallel_size", where=key,
                got=f"{count} and {pp}", fix=f"change train.{name}",
            )  # fmt: skip
    if pp > 2:
        return
    # Between two ranks, megatron-core cannot tell forward from backward shapes when it has to exchange them.
    if recipe.data.padding == "longest" or recipe.data.packing:
        yield LayoutProblem(
            rule="virtual stages on a pipeline of two need rows of one length", where=key,
            got=f"padding = {recipe.data.padding}, packing = {recipe.data.packing}",
            fix="set data.padding = 'max_length' without packing, or use more stages",
        )  # fmt: skip
    levels = len(architecture.vision.deepstack_visual_indexes)
    if stages and stages[0] // vpp < levels:
        yield LayoutProblem(
            rule="virtual stages on a pipeline of two need as many layers in the first as there are deepstack levels",
            where=key, got=f"{stages[0] // vpp} layers, {levels} levels", fix="use fewer virtual stages",
        )  # fmt: skip


def _sequence(recipe: Recipe) -> Iterator[LayoutProblem]:
    multiple = sequence_multiple(recipe)
    if recipe.data.seq_length % multiple:
        yield LayoutProblem(
            rule="seq_length must be a multiple of what sequence and context parallelism cut it into",
            where="data.seq_length", got=f"{recipe.data.seq_length}, pieces {multiple}",
            fix=f"use {-(-recipe.data.seq_length // multiple) * multiple}",
        )  # fmt: skip
    shapes, cp = recipe.data.fixed_shapes, recipe.parallel.context_parallel_size
    if shapes is not None and cp > 1 and recipe.data.seq_length % (2 * cp * shapes.samples):
        yield LayoutProblem(
            rule="context parallelism cuts every sample into two pieces a rank", where="data.fixed_shapes.samples",
            got=f"{shapes.samples} samples in {recipe.data.seq_length} tokens, {2 * cp} pieces",
            fix="change samples or seq_length so that they divide",
        )  # fmt: skip


def _experts(architecture: Architecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    parallel, moe = recipe.parallel, architecture.text.moe
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if moe is None:
        if ep > 1 or etp is not None:
            yield LayoutProblem(
                rule="expert parallelism needs a mixture of experts", where="parallel.expert_model_parallel_size",
                got=f"a dense model, ep {ep}, etp {etp}", fix="leave it out",
            )  # fmt: skip
        if recipe.model.experts_backend == "grouped":
            yield LayoutProblem(
                rule="only a mixture of experts has experts", where="model.experts_backend",
                got=f"a dense model, {recipe.model.experts_backend}", fix="leave it out",
            )  # fmt: skip
        if parallel.moe_token_dispatcher_type == "allgather":
            yield LayoutProblem(
                rule="only a mixture of experts sends tokens to experts", where="parallel.moe_token_dispatcher_type",
                got="a dense model, allgather", fix="leave it out",
            )  # fmt: skip
        return
    if moe.topk == 1:  # its one weight, renormalised, would be 1 and teach the router nothing
        yield LayoutProblem(
            rule="megatron-core does not route to a single expert with renormalised weights", where="model.checkpoint",
            got="num_experts_per_tok = 1", fix="choose a checkpoint that routes to two experts or more",
        )  # fmt: skip
    yield from _divides(ep, moe.num_experts, "the number of experts", "parallel.expert_model_parallel_size")
    tensor = parallel.expert_tensor_size
    yield from _divides(
        tensor, moe.ffn_hidden_size, "an expert's ffn_hidden_size", "parallel.expert_tensor_parallel_size"
    )
    num_ranks = expert_ranks(recipe) * parallel.pipeline_model_parallel_size
    if recipe.num_processes % num_ranks:
        yield LayoutProblem(
            rule="num_processes must be a multiple of etp * ep * pp", where="parallel.expert_model_parallel_size",
            got=f"{recipe.num_processes} and {num_ranks}", fix="change num_processes or the expert layout",
        )  # fmt: skip
    if parallel.moe_token_dispatcher_type == "allgather" and not has_equal_shares(recipe):
        yield LayoutProblem(
            rule="ranks that gather each other's tokens must have rows of one length",
            where="parallel.moe_token_dispatcher_type", got="allgather with data.padding = longest",
            fix="use padding = 'max_length', or moe_token_dispatcher_type = 'alltoall'",
        )  # fmt: skip


def _fp8(architecture: Architecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    if recipe.precision.fp8 is None:
        return
    parallel, text = recipe.parallel, architecture.text
    tp = parallel.tensor_model_parallel_size
    width = text.moe.ffn_hidden_size if text.moe is not None else text.ffn_hidden_size
    split = {
        "hidden_size": text.hidden_size,
        "ffn_hidden_size / tp": width // tp,
        "num_attention_heads * kv_channels / tp": text.num_attention_heads * text.kv_channels // tp,
        "padded tokens of a rank": recipe.data.seq_length * recipe.train.micro_batch_size
        // (parallel.context_parallel_size * (tp if parallel.sequence_parallel else 1)),
    }  # fmt: skip
    for what, number in split.items():
        if number % 16:
            yield LayoutProblem(
                rule=f"fp8 matrix products need {what} to be a multiple of 16", where="precision.fp8",
                got=str(number), fix="change the layout or leave fp8 out",
            )  # fmt: skip


def _other(architecture: Architecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    layers, levels = recipe.model.num_layers, len(architecture.vision.deepstack_visual_indexes)
    if layers is not None and not levels <= layers <= architecture.text.num_layers:
        yield LayoutProblem(
            rule="num_layers must hold the deepstack levels and not exceed the checkpoint's layers",
            where="model.num_layers", got=str(layers), fix=f"choose {levels} to {architecture.text.num_layers}",
        )  # fmt: skip
    groups = {"language", "vision", "projector"} | ({"audio"} if architecture.audio is not None else set())
    if groups <= set(recipe.model.freeze):
        yield LayoutProblem(
            rule="something must be left to train", where="model.freeze", got=", ".join(recipe.model.freeze),
            fix="leave a group out",
        )  # fmt: skip
    if "audio" in recipe.model.freeze and architecture.audio is None:
        yield LayoutProblem(
            rule="only a model with an audio tower can freeze it", where="model.freeze", got=architecture.family,
            fix="leave 'audio' out",
        )  # fmt: skip
