# SPDX-License-Identifier: Apache-2.0
"""AdamW in one launch, on the states of TransformerEngine's, whose own step takes many, and passes around it.

With 16-bit moments it unpacks those of a whole parameter group at once, 8 bytes a parameter, which is more than the
short states save. Here bf16 weights take a kernel that unpacks nothing, and others get to it piece by piece; what is
computed for a parameter depends on no other.

With fp32 states gradients are scaled before it and bf16 weights copied from fp32 ones behind it, by a launch a tensor:
the device waits for those, since an update does not begin before the norm of the gradients is known.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.common.kernels.adamw import (
    AdamW,
    HalvedWeight,
    Launch,
    Weight,
    WholeWeight,
    adamw_step,
    addresses_of,
    plan_launches,
)

PIECE = 2**27
"""Parameters that TransformerEngine unpacks at a time, one GiB of moments, unless a single tensor has more."""


class _Launches:
    """Planned anew where a tensor of a parameter group has moved."""

    def __init__(self) -> None:
        self._planned: dict[int, tuple[list[tuple[int, ...]], list[Launch]]] = {}

    def of_group(self, index: int, weights: Sequence[Weight]) -> list[Launch]:
        addresses = addresses_of(weights)
        if index not in self._planned or self._planned[index][0] != addresses:
            self._planned[index] = addresses, plan_launches(weights)
        return self._planned[index][1]


def step_whole_states(part: Any) -> None:
    """Make a step of fp32 states one launch, which scales gradients and writes the model's weights.

    Its AdamW gets a `gradient_scale`, with which its next step multiplies gradients: no pass of its own does.

    Args:
        part: Megatron's distributed optimizer around TransformerEngine's AdamW, not in the precision-aware mode.
    """
    inner, launches = part.optimizer, _Launches()
    inner.gradient_scale = 1.0
    model_weights: dict[Tensor, Tensor] = {p: p for group in inner.param_groups for p in group["params"]} | {
        main: weight
        for mains, weights in zip(part.shard_fp32_from_float16_groups, part.shard_float16_groups, strict=True)
        for main, weight in zip(mains, weights, strict=True)
    }

    @torch.no_grad()
    def step(closure: None = None) -> None:
        assert closure is None
        scale, inner.gradient_scale = inner.gradient_scale, 1.0
        for index, group in enumerate(inner.param_groups):
            if not group["params"]:
                continue
            weights = [
                WholeWeight(p, p.grad, *_moments(inner, p), model_weights[p])
                for p in group["params"]
                if p.grad is not None
            ]
            group["step"] = group.get("step", 0) + 1
            for launch in launches.of_group(index, weights):
                adamw_step(launch, _settings(group, group["step"], scale))

    def write_model_weights() -> None:
        """The step did."""

    inner.step, part._copy_main_params_to_model_params = step, write_model_weights


def step_short_states(inner: Any, *, piece: int = PIECE) -> None:
    """Make an AdamW step in little memory.

    It gets a `gradient_scale`, with which its next step multiplies gradients: nobody does so in a pass of its own.

    Args:
        inner: TransformerEngine's AdamW in Megatron's precision-aware mode, or one like it.
        piece: Parameters at a time that go through its own step.
    """
    own_step, launches = inner.step, _Launches()
    inner.gradient_scale = 1.0

    @torch.no_grad()
    def step(closure: None = None) -> None:
        assert closure is None
        groups, scale = inner.param_groups, inner.gradient_scale
        try:
            for index, group in enumerate(groups):
                if not group["params"]:
                    continue
                count = group.get("step", 0)
                halved = [p for p in group["params"] if _is_halved(inner, p)]
                weights = [_halved_weight(inner, p) for p in halved if _gradient(p) is not None]
                for launch in launches.of_group(index, weights):
                    adamw_step(launch, _settings(group, count + 1, scale))
                others = [p for p in group["params"] if not _is_halved(inner, p)]
                _scale(others, scale)
                for parameters in pieces(others, piece):
                    inner.param_groups = [group | {"params": parameters, "step": count}]
                    own_step()
                group["step"] = count + 1
        finally:
            inner.param_groups, inner.gradient_scale = groups, 1.0

    inner.step = step


def _is_halved(inner: Any, parameter: Tensor) -> bool:
    """Whether the lower half of an fp32 weight lies beside a bf16 one."""
    return inner.store_param_remainders and parameter.dtype is torch.bfloat16


def _gradient(parameter: Any) -> Tensor | None:
    return getattr(parameter, "decoupled_grad", None)


def _halved_weight(inner: Any, parameter: Any) -> HalvedWeight:
    moments = _moments(inner, parameter, has_remainder=True)
    return HalvedWeight(parameter, parameter.decoupled_grad, *moments, inner.state[parameter]["master_param"])


def _moments(inner: Any, parameter: Any, *, has_remainder: bool = False) -> tuple[Tensor, Tensor]:
    state = inner.state[parameter]
    if not state:
        inner.initialize_state(parameter, has_remainder)
    return state["exp_avg"], state["exp_avg_sq"]


def _scale(parameters: list[Any], scale: float) -> None:
    gradients = [gradient for p in parameters if (gradient := _gradient(p)) is not None]
    if gradients and scale != 1.0:
        torch._foreach_mul_(gradients, scale)


def _settings(group: dict[str, Any], step: int, gradient_scale: float) -> AdamW:
    beta1, beta2 = group["betas"]
    return AdamW(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=step,
        bias_correction=bool(group["bias_correction"]),
        gradient_scale=gradient_scale,
    )


def pieces(parameters: list[Tensor], piece: int) -> Iterator[list[Tensor]]:
    """Neighbours that together have at most `piece` elements, or one tensor that has more."""
    chosen: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if chosen and size + parameter.numel() > piece:
            yield chosen
            chosen, size = [], 0
        chosen.append(parameter)
        size += parameter.numel()
    if chosen:
        yield chosen
