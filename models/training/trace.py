# SPDX-License-Identifier: Apache-2.0
"""Records one step of a run for `qwen-harness diverge`: what goes through the model, forward and backward.

Every rank writes what its part of the model put out for its first micro-batch; nothing is sent around. Points have the
Megatron engine's names, with the layer's number in the whole model, whatever the engine and the layout. A decoder or
vision layer is recorded by what comes in, which is after the deepstack features of the layer before.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.common.batch import Batch
from models.common.context_parallel import local_index
from models.common.vision_split import item_bounds
from models.contract.divergence import TraceHeader, trace_file
from models.training.parallel import Ranks
from models.training.progress import Run

TRANSFORMERS_NAMES = (
    (r"(?:model\.)?visual\.blocks\.(\d+)\.attn", r"vision_model.layers.\1.self_attention"),
    (r"(?:model\.)?visual\.blocks\.(\d+)", r"vision_model.layers.\1"),
    (
        r"(?:model\.)?visual\.(?:deepstack_merger_list|merger_list)\.(\d+)",
        r"vision_model.deepstack_mergers.\1",
    ),
    (r"(?:model\.)?visual\.merger", r"vision_model.merger"),
    (r"(?:model\.)?audio_tower\.layers\.(\d+)", r"audio_model.layers.\1"),
    (
        r"model\.(?:language_model\.)?layers\.(\d+)\.self_attn",
        r"language_model.decoder.layers.\1.self_attention",
    ),
    (r"model\.(?:language_model\.)?layers\.(\d+)", r"language_model.decoder.layers.\1"),
    (r"model\.(?:language_model\.)?norm", r"language_model.decoder.final_layernorm"),
    (r"lm_head", r"language_model.output_layer"),
)
"""Names of transformers' modules, and ours; what follows the name stays."""
LAYER = r"(?:vision_model|audio_model|language_model\.decoder)\.layers\.\d+"
INPUTS = re.compile(LAYER)
OUTPUTS = re.compile(
    rf"{LAYER}\.(?:self_attention|mlp)|vision_model\.(?:merger|deepstack_mergers\.\d+)"
    r"|language_model\.(?:decoder\.final_layernorm|output_layer)"
)
Points = dict[str, nn.Module]


def transformers_points(model: nn.Module) -> Points:
    """Modules of a transformers model by our names."""
    found = {}
    for name, module in model.named_modules():
        for pattern, ours in TRANSFORMERS_NAMES:
            match = re.match(rf"{pattern}(?=\.|$)", name)
            if match:
                found[match.expand(ours) + name[match.end() :]] = module
                break
    return _watched(found)


def megatron_points(chunks: Sequence[nn.Module]) -> Points:
    """Modules of this rank's chunks by name; decoder layers by their number in the whole model."""
    found = {}
    for chunk in chunks:
        for name, module in chunk.named_modules():
            prefix, _, rest = name.partition("language_model.decoder.layers.")
            if rest and not prefix:
                local = rest.partition(".")[0]
                layer: Any = chunk.get_submodule(f"language_model.decoder.layers.{local}")
                name = f"language_model.decoder.layers.{layer.layer_number - 1}{rest[len(local) :]}"
            found[name] = module
    return _watched(found)


def _watched(modules: Points) -> Points:
    return {
        name: module for name, module in modules.items() if INPUTS.fullmatch(name) or OUTPUTS.fullmatch(name)
    }


@contextmanager
def record(points: Points) -> Iterator[dict[str, Tensor]]:
    """Record points while the block runs: ``forward|name`` and ``backward|name``, fp32 copies on the CPU.

    A point keeps its first value, which is the first micro-batch's; under recomputation its gradient is that of the
    first pass that has one.
    """
    found: dict[str, Tensor] = {}
    hooked: set[str] = set()

    def keep(key: str, tensor: Tensor) -> None:
        if key not in found:
            found[key] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()

    def see(name: str, value: Tensor, source: Tensor) -> None:
        keep(f"forward|{name}", value)
        if source.requires_grad and name not in hooked:
            hooked.add(name)
            source.register_hook(lambda gradient: keep(f"backward|{name}", gradient))

    handles = []
    for name, module in points.items():
        if INPUTS.fullmatch(name):
            # Before the hooks of others: fully_shard hands the layer a view, whose gradient is not the whole.
            hook = _input_hook(name, see)
            handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_output_hook(name, see)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


See = Callable[[str, Tensor, Tensor], None]


def _input_hook(name: str, see: See) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden_states = arguments[0] if arguments else named["hidden_states"]
        see(name, hidden_states, hidden_states)

    return hook


def _output_hook(name: str, see: See) -> Callable[..., None]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        parts: list[Any] = [*output] if isinstance(output, tuple) else [output]
        # Megatron hands a bias on beside the product, to be added later.
        bias = parts[1] if len(parts) > 1 and isinstance(parts[1], Tensor) and parts[1].ndim == 1 else None
        see(name, parts[0] if bias is None else parts[0] + bias, parts[0])

    return hook


@contextmanager
def traced_step(run: Run, batches: list[Batch], denominator: float) -> Iterator[None]:
    """Record the step that the block takes, if it is the one that was asked for."""
    iteration = run.progress.iteration + 1
    if run.options.trace != iteration:
        yield
        return
    with record(run.engine.trace_points()) as found:
        yield
    scale = run.engine.gradient_scale(denominator)
    tensors = {
        key: tensor * scale if key.startswith("backward|") else tensor for key, tensor in found.items()
    }
    path = trace_file(run.directory, iteration, run.engine.ranks.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"header": header_of(run, batches[0]).model_dump_json()})


def header_of(run: Run, batch: Batch) -> TraceHeader:
    """What is needed to put the pieces of all ranks together, sample by sample."""
    ranks, parallel = run.engine.ranks, run.recipe.parallel
    rows, length = batch.input_ids.shape
    lengths = [length] if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    columns = list(range(length))
    if ranks.layout["cp"] > 1:
        columns = local_index(lengths, ranks.layout["cp"], ranks.cp_rank).tolist()
    starts = [0] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    places = (
        [(0, start) for start in starts] if batch.cu_seqlens is not None else [(b, 0) for b in range(rows)]
    )

    def owners(positions: Tensor | None) -> list[int]:
        """Placeholders of every sample."""
        flat = [] if positions is None else positions.tolist()
        return [
            sum(row * length + start <= position < row * length + start + size for position in flat)
            for (row, start), size in zip(places, batch.sample_lengths, strict=False)
        ]

    return TraceHeader(
        iteration=run.progress.iteration + 1, engine=run.recipe.train.engine, dp_rank=ranks.dp_rank,
        tp_rank=ranks.tp_rank, tp_size=ranks.layout["tp"], cp_rank=ranks.cp_rank,
        is_sequence_first=run.recipe.train.engine == "megatron", is_sequence_parallel=parallel.sequence_parallel,
        columns=columns, row_length=length,
        sample_keys=list(batch.sample_keys), sample_lengths=list(batch.sample_lengths),
        sample_places=places[: len(batch.sample_keys)],
        vision_counts=owners(_seen_here(batch, ranks)), audio_counts=owners(batch.audio_positions),
    )  # fmt: skip


def _seen_here(batch: Batch, ranks: Ranks) -> Tensor | None:
    """Places of the vision tokens that this rank's tower makes."""
    if batch.vision_positions is None or batch.grid_thw is None:
        return None
    patches, cp = batch.grid_thw.prod(dim=1), ranks.layout["cp"]
    ends = [0, *patches.cumsum(0).tolist()]
    first, last = (ends[item] for item in item_bounds(patches, cp)[ranks.cp_rank : ranks.cp_rank + 2])
    merge = ends[-1] // batch.vision_positions.numel()
    return batch.vision_positions[first // merge : last // merge]
