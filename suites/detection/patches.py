# SPDX-License-Identifier: Apache-2.0
"""Faults of model, data and training, as patches of a child process that is about to train.

Production code has no hook for these: each function replaces one attribute, and the process ends with its run.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from models.common import multimodal, rope, transformer_configs, vision
from models.common.attention import TorchCoreAttention
from models.common.batch import IGNORED_LABEL, Batch
from models.contract.recipe import parse_recipe
from models.training import evaluation, loop, start
from models.training.megatron_engine import MegatronEngine

PATCHES: dict[str, Callable[[], None]] = {}
BatchChange = Callable[[Batch], Batch]


def patch(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a patch under its function's name."""
    PATCHES[function.__name__] = function
    return function


# --- model -----------------------------------------------------------------------------------------------------------


def _architecture(part: str, **changes: Any) -> None:
    """Build the model as if the checkpoint's config said something else."""
    load = start.load_architecture

    def changed(folder: Any) -> Any:
        architecture = load(folder)
        return dataclasses.replace(
            architecture, **{part: dataclasses.replace(getattr(architecture, part), **changes)}
        )

    start.load_architecture = changed


@patch
def mrope_sections() -> None:
    axes = rope.mrope_axes
    rope.mrope_axes = lambda section, *, interleaved: (axes(section, interleaved=interleaved) + 1) % 3


@patch
def mrope_layout() -> None:
    axes = rope.mrope_axes
    rope.mrope_axes = lambda section, *, interleaved: axes(section, interleaved=not interleaved)


@patch
def rope_theta() -> None:
    _architecture("text", rotary_base=1e4)


@patch
def deepstack_off() -> None:
    dense = multimodal.dense_features
    multimodal.dense_features = lambda tokens, positions, shape: 0.0 * dense(tokens, positions, shape)


@patch
def deepstack_levels() -> None:
    forward = vision.VisionTower.forward

    def swapped(self: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> Any:
        tokens, features = forward(self, pixel_values, grid_thw)
        return tokens, features[::-1]

    vision.VisionTower.forward = swapped


@patch
def causal_mask_off() -> None:
    start_of = TorchCoreAttention.__init__

    def without_mask(self: Any, *args: Any, **kwargs: Any) -> None:
        start_of(self, *args, **kwargs)
        self.is_causal = False

    TorchCoreAttention.__init__ = without_mask


@patch
def vision_activation() -> None:
    _architecture("vision", hidden_act="silu")


@patch
def vision_rope() -> None:
    _architecture("vision", rotary_base=2.0)


@patch
def position_table_off() -> None:
    layout = vision.vision_layout

    def without_table(*args: Any) -> Any:
        return dataclasses.replace(layout(*args), table_index=None, table_weight=None)

    vision.vision_layout = without_table


@patch
def tied_weights() -> None:
    prepare = MegatronEngine.prepare

    def untied(self: MegatronEngine) -> None:
        # The table that logits are made with is a copy whose rows moved on by one.
        model = self.modules[0].language_model
        weight = model.shared_embedding_or_output_weight().detach().roll(1, 0).clone()
        model.shared_embedding_or_output_weight = lambda: weight
        prepare(self)

    MegatronEngine.prepare = untied


@patch
def qk_norm_off() -> None:
    prepare = MegatronEngine.prepare

    def without_norm(self: MegatronEngine) -> None:
        for layer in self.modules[0].language_model.decoder.layers:
            for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
                norm.forward = lambda values: values
        prepare(self)

    MegatronEngine.prepare = without_norm


@patch
def merge_order() -> None:
    merge = multimodal.merge_tokens
    multimodal.merge_tokens = lambda embeddings, tokens, positions, **names: merge(
        embeddings, tokens.flip(0), positions, **names
    )


@patch
def window_off() -> None:
    layout = vision.vision_layout
    vision.vision_layout = lambda *args: dataclasses.replace(layout(*args), window_lengths=None)


def _moe_setting(**changes: Any) -> None:
    settings = transformer_configs._moe
    transformer_configs._moe = lambda text, run: settings(text, run) | changes


@patch
def router_scores() -> None:
    _moe_setting(moe_router_score_function="sigmoid")


@patch
def router_topk() -> None:
    settings = transformer_configs._moe

    def more(text: Any, run: Any) -> dict[str, Any]:
        values = settings(text, run)
        return values | {"moe_router_topk": values["moe_router_topk"] + 1}

    transformer_configs._moe = more


# --- data ------------------------------------------------------------------------------------------------------------


class _Changed:
    """A loader whose batches go through a change."""

    def __init__(self, loader: Any, stream: Iterator[Batch]) -> None:
        self._loader, self._stream = loader, stream

    def __iter__(self) -> "_Changed":
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _stream(change: Callable[[Iterator[Batch]], Iterator[Batch]]) -> None:
    build = start.build_loader

    def changed(*args: Any, split: Any, **kwargs: Any) -> Any:
        loader = build(*args, split=split, **kwargs)
        return _Changed(loader, change(iter(loader))) if split == "train" else loader

    start.build_loader = changed


def _batches(change: BatchChange) -> None:
    _stream(lambda batches: map(change, batches))


def _with_labels(batch: Batch, labels: torch.Tensor) -> Batch:
    return dataclasses.replace(
        batch, labels=labels, num_supervised_tokens=int((labels != IGNORED_LABEL).sum())
    )


def _labels(batch: Batch) -> torch.Tensor:
    assert batch.labels is not None
    return batch.labels


def _pixels(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    if batch.pixel_values is None:
        return batch
    return dataclasses.replace(batch, pixel_values=change(batch.pixel_values))


@patch
def labels_shifted() -> None:
    _batches(lambda batch: dataclasses.replace(batch, labels=_labels(batch).roll(-1, 1)))


@patch
def header_in_loss() -> None:
    def change(batch: Batch) -> Batch:
        labels = _labels(batch).clone()
        following = batch.input_ids.roll(-1, 1)
        for row, length in enumerate(batch.sample_lengths):
            labels[row, : length - 1] = following[row, : length - 1]
        return _with_labels(batch, labels)

    _batches(change)


@patch
def answer_cut() -> None:
    def change(batch: Batch) -> Batch:
        is_supervised = _labels(batch) != IGNORED_LABEL
        is_first = is_supervised & ~is_supervised.roll(1, 1)
        return _with_labels(batch, _labels(batch).masked_fill(~is_first, IGNORED_LABEL))

    _batches(change)


@patch
def images_shuffled() -> None:
    def change(batch: Batch) -> Batch:
        if batch.grid_thw is None or len(batch.grid_thw) < 2:
            return batch
        # Pictures of one size keep every count right.
        patches = int(batch.grid_thw[0].prod())
        return _pixels(batch, lambda values: values.roll(patches, 0))

    _batches(change)


@patch
def images_blank() -> None:
    _batches(_blank)


@patch
def taught_blind() -> None:
    _batches(_blank)


@patch
def held_out_blind() -> None:
    build = evaluation.build_loader

    def changed(*args: Any, **kwargs: Any) -> Any:
        loader = build(*args, **kwargs)
        return _Changed(loader, map(_blank, iter(loader)))

    evaluation.build_loader = changed


@patch
def late_blank() -> None:
    _late(_blank)


@patch
def late_labels() -> None:
    _late(lambda batch: dataclasses.replace(batch, labels=_labels(batch).roll(-1, 1)))


def _blank(batch: Batch) -> Batch:
    return _pixels(batch, torch.zeros_like)


def _late(change: BatchChange) -> None:
    """Change what follows the first 24 steps of two micro-batches."""
    _stream(
        lambda batches: (change(batch) if number >= 48 else batch for number, batch in enumerate(batches))
    )


@patch
def wrong_normalisation() -> None:
    _batches(lambda batch: _pixels(batch, lambda values: values * 0.5 + 0.5))


@patch
def channels_swapped() -> None:
    _batches(lambda batch: _pixels(batch, lambda values: values.unflatten(1, (3, -1)).flip(1).flatten(1)))


@patch
def text_positions() -> None:
    def change(batch: Batch) -> Batch:
        line = torch.arange(batch.input_ids.shape[1])
        return dataclasses.replace(batch, position_ids=line.expand_as(batch.position_ids).contiguous())

    _batches(change)


@patch
def duplicate_shard() -> None:
    def twice(batches: Iterator[Batch]) -> Iterator[Batch]:
        return itertools.chain.from_iterable((batch, batch) for batch in batches)

    _stream(twice)


@patch
def data_order() -> None:
    def swapped(batches: Iterator[Batch]) -> Iterator[Batch]:
        # Whole steps of two micro-batches change places; within a step the order makes no difference.
        for four in zip(batches, batches, batches, batches, strict=False):
            yield from (*four[2:], *four[:2])

    _stream(swapped)


# --- training --------------------------------------------------------------------------------------------------------


def _engine_recipe(section: str, **changes: Any) -> None:
    """Train by another recipe than the one that is written down."""
    start_of = MegatronEngine.__init__

    def changed(self: Any, recipe: Any, *args: Any) -> None:
        data = recipe.model_dump(mode="json")
        data[section] |= changes
        start_of(self, parse_recipe(data, where="planted fault"), *args)

    setattr(MegatronEngine, "__init__", changed)  # noqa: B010 - what a type checker refuses is the point


def _gradients(change: Callable[[MegatronEngine], None]) -> None:
    """Do something to the gradients of a step, after they are made."""
    run = MegatronEngine.forward_backward

    def changed(self: MegatronEngine, batches: list[Batch], **kwargs: Any) -> Any:
        sums = run(self, batches, **kwargs)
        change(self)
        return sums

    MegatronEngine.forward_backward = changed


@patch
def learning_rate() -> None:
    _engine_recipe("optimizer", lr=6e-3)


@patch
def learning_rate_hidden() -> None:
    update = MegatronEngine.update

    def changed(self: MegatronEngine) -> Any:
        for group in self.optimizer.param_groups:
            group["lr"] *= 2.0
        return update(self)

    MegatronEngine.update = changed


@patch
def warmup_missing() -> None:
    _engine_recipe("optimizer", lr_warmup_iters=0)


@patch
def clip_off() -> None:
    _engine_recipe("optimizer", clip_grad=0.0)


@patch
def loss_scaling() -> None:
    def double(engine: MegatronEngine) -> None:
        for chunk in engine.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.grad_data.mul_(2.0)

    _gradients(double)


@patch
def tower_frozen() -> None:
    _engine_recipe("model", freeze=["vision"])


@patch
def wrong_reduction() -> None:
    _engine_recipe("train", loss_reduction="per_sample")
    denominator = loop.loss_denominator
    loop.loss_denominator = lambda batch, reduction: denominator(batch, "per_sample")


@patch
def missing_all_reduce() -> None:
    run = MegatronEngine.forward_backward

    def half(self: MegatronEngine, batches: list[Batch], **kwargs: Any) -> Any:
        # The other rank's half never arrives; the loss is still that of the whole batch.
        whole = self.evaluate(batches)
        run(self, batches[: len(batches) // 2], **kwargs)
        return whole

    MegatronEngine.forward_backward = half


@patch
def gradients_pile_up() -> None:
    MegatronEngine.discard = lambda self: None


@patch
def optimizer_asleep() -> None:
    update = MegatronEngine.update

    def changed(self: MegatronEngine) -> Any:
        kept = [parameter.detach().clone() for module in self.modules for parameter in module.parameters()]
        result = update(self)
        parameters = (parameter for module in self.modules for parameter in module.parameters())
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                master.grad = None
        return result

    MegatronEngine.update = changed


@patch
def adam_betas() -> None:
    _engine_recipe("optimizer", adam_beta2=0.5)


@patch
def loss_smoothed() -> None:
    rows = loop.step_row
    memory: list[float] = []

    def smooth(run: Any, counts: Any, times: Any, loss: float, update: Any) -> Any:
        memory.append(loss)
        recent = memory[-10:]
        return rows(run, counts, times, sum(recent) / len(recent), update)

    loop.step_row = smooth
