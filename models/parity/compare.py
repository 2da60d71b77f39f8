# SPDX-License-Identifier: Apache-2.0
"""Both sides of a comparison: what transformers computes, what our model computes, and how far they are apart."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor
from transformers import PreTrainedModel

from models.common.batch import IGNORED_LABEL, Batch
from models.common.multimodal import MultimodalModel
from models.common.weight_rules import WeightRule
from models.parity.cases import Case
from models.parity.oracles import named_tensors
from models.parity.routing import Routing, recorded_oracle


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computes for a case."""

    logits: Tensor
    """[b, s, v]."""
    token_losses: Tensor
    """[b, s], zero where ignored."""
    gradients: dict[str, Tensor]
    """Gradient of the mean token loss, by Megatron key, global shapes."""
    routing: Routing = ()
    """Experts of every position, see :mod:`models.parity.routing`; empty for dense models."""


def run_oracle(name: str, model: PreTrainedModel, case: Case, rules: tuple[WeightRule, ...]) -> Reference:
    """Logits, losses and the gradient of every mapped parameter, from transformers."""
    model.zero_grad()
    with recorded_oracle(model) as routing:
        logits = model(**case.hf_inputs).logits
    labels = case.batch.labels
    assert labels is not None
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    (losses.sum() / case.batch.num_supervised_tokens).backward()
    gradients = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in model.named_parameters()
    }
    mapped = to_megatron(named_tensors(name, gradients), rules)
    return Reference(logits.detach(), losses.detach(), mapped, tuple(routing))


def to_megatron(tensors: Mapping[str, Tensor], rules: tuple[WeightRule, ...]) -> dict[str, Tensor]:
    """Global Megatron tensors from transformers' (weights or gradients), in fp32."""
    return {rule.key: _assemble(rule, tensors) for rule in rules}


def _assemble(rule: WeightRule, tensors: Mapping[str, Tensor]) -> Tensor:
    out = torch.empty(rule.shape)
    for piece in rule.pieces:
        source = rule.sources[piece.source]
        value = tensors[source.name].detach()
        if source.view != "same":
            value = value.transpose(-1, -2) if source.view == "transposed" else value.flatten(1)
        size = piece.size[-value.ndim :]
        box = tuple(
            slice(start, start + extent) for start, extent in zip(piece.source_start, size, strict=True)
        )
        where = tuple(
            slice(start, start + extent) for start, extent in zip(piece.target_start, piece.size, strict=True)
        )
        out[where] = value[box].reshape(piece.size)
    return out


def shards(model: MultimodalModel, prefix: str = "") -> list[ShardedTensor]:
    """Every shard that this rank's model holds, in the order in which its state dict has them."""
    state = model.sharded_state_dict(prefix)
    apply_factories(state)
    return _sharded_tensors(state)


def _sharded_tensors(state: object) -> list[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [part for value in values for part in _sharded_tensors(value)]


def _slice_of(part: ShardedTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    where = tuple(
        slice(start, start + size) for start, size in zip(part.global_offset, _sizes(part), strict=True)
    )
    return tensors[part.key][where].reshape(part.local_shape)


def _sizes(part: ShardedTensor) -> tuple[int, ...]:
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


@torch.no_grad()
def load(model: MultimodalModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model (or one rank's part of it) from global tensors."""
    for part in shards(model):
        assert part.data is not None
        part.data.copy_(_slice_of(part, tensors))


@torch.no_grad()
def gradient_errors(
    model: MultimodalModel,
    reference: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    floor: float = 5e-5,
) -> dict[str, float]:
    """Relative error of every gradient this rank holds.

    Args:
        model: The model; its parameters' values are swapped for gradients and put back.
        reference: Global gradients by Megatron key.
        gradients: This rank's gradients by parameter name.
        floor: Share of the largest gradient that a smaller one is measured against.

    Returns: For every key, the norm of the difference over the norm of the reference, both of this rank's part. Where
    the part is next to nothing it is measured against the tensor, and where the tensor is (a key's bias, which the
    softmax cancels: 1e-9 of rounding in fp32), against `floor`; the smallest real one is 5e-4 of the largest.
    """
    errors: dict[str, float] = {}
    smallest = floor * max(gradient.norm().item() for gradient in reference.values())
    with _gradient_shards(model, gradients) as parts:
        for part in parts:
            assert part.data is not None
            wanted = _slice_of(part, reference)
            whole = reference[part.key]
            scale = max(wanted.norm().item(), 1e-3 * whole.norm().item(), smallest)
            difference = (part.data.to("cpu", torch.float32) - wanted).norm().item()
            errors[part.key] = max(errors.get(part.key, 0.0), difference / scale)
    return errors


@torch.no_grad()
def gradient_square_sum(model: MultimodalModel, gradients: Mapping[str, Tensor]) -> float:
    """Sum of the squares of this rank's gradients, each tensor counted by one of the ranks that hold it.

    Args:
        model: As for :func:`gradient_errors`.
        gradients: This rank's gradients by parameter name.
    """
    with _gradient_shards(model, gradients) as parts:
        counted = [part.data for part in parts if part.data is not None and is_main_replica(part.replica_id)]
        return sum(gradient.double().square().sum().item() for gradient in counted)


def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """Norm over all global gradients."""
    return sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5


@contextlib.contextmanager
def _gradient_shards(
    model: MultimodalModel, gradients: Mapping[str, Tensor]
) -> Iterator[list[ShardedTensor]]:
    """The model's shards with gradients for values; they refer to the parameters, which are put back at the end."""
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = gradients[name].to(values[name].dtype)
    try:
        yield shards(model)
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = values[name]


def relative_error(ours: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference over the largest reference value, where `mask` holds."""
    if mask is not None:
        ours, reference = ours[mask], reference[mask]
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-9)).item()


def real_positions(batch: Batch) -> Tensor:
    """[b, s] bool: positions that are not padding. Of a packed row, [1, s]."""
    lengths, place = torch.tensor(batch.sample_lengths), torch.arange(batch.input_ids.shape[1])
    if batch.cu_seqlens is None:
        return place < lengths[:, None]
    starts = batch.cu_seqlens[: len(lengths)].long()
    return ((place >= starts[:, None]) & (place < (starts + lengths)[:, None])).any(dim=0)[None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far our model is from transformers on one case."""

    logits: float
    """Largest difference over the largest reference logit, real positions."""
    loss: float
    """The same of token losses."""
    gradient: float
    """Largest relative error of any parameter's gradient."""
    worst: str
    """That parameter."""
    num_gradients: int
    gradient_norm: float
    """Relative difference of the norm over all gradients."""


def compare(
    model: MultimodalModel, batch: Batch, reference: Reference, *, gradient_floor: float = 5e-5
) -> Comparison:
    """Run our model on one process and measure it against the reference.

    Args:
        model: With the reference's weights, see :func:`load`.
        batch: The reference's micro-batch, with labels.
        reference: From :func:`run_oracle`.
        gradient_floor: See :func:`gradient_errors`; half precision leaves more rounding behind.
    """
    on_device = batch.to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model(dataclasses.replace(on_device, labels=None)).to("cpu", torch.float32)
    model.zero_grad()
    losses = model(on_device)
    (losses.sum() / batch.num_supervised_tokens).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}: data parallelism would wait for it for ever"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = gradient_errors(model, reference.gradients, gradients, floor=gradient_floor)  # type: ignore[arg-type]
    worst = max(errors, key=errors.__getitem__)
    norm = gradient_norm(reference.gradients)
    return Comparison(
        logits=relative_error(logits, reference.logits, real_positions(batch)),
        loss=relative_error(losses.detach().cpu(), reference.token_losses),
        gradient=errors[worst],
        worst=worst,
        num_gradients=len(errors),
        gradient_norm=abs(gradient_square_sum(model, gradients) ** 0.5 - norm) / norm,  # type: ignore[arg-type]
    )
