# SPDX-License-Identifier: Apache-2.0
"""AdamW whose moments have 16 bits: TransformerEngine's states, stepped without an fp32 copy of them.

TransformerEngine's own step unpacks the moments of a whole parameter group at once, 8 bytes a parameter, which is more
than the short states save. Here bf16 weights take a kernel that unpacks nothing, and others get to it piece by piece;
what is computed for a parameter depends on no other.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.common.kernels.adamw import AdamW, Launch, Weight, adamw_step, addresses_of, plan_launches

PIECE = 2**27
"""Parameters that TransformerEngine unpacks at a time, one GiB of moments, unless a single tensor has more."""


def step_short_states(inner: Any, *, piece: int = PIECE) -> None:
    """Make an AdamW step in little memory.

    It gets a `gradient_scale`, with which its next step multiplies gradients: nobody does so in a pass of its own.

    Args:
        inner: TransformerEngine's AdamW in Megatron's precision-aware mode, or one like it.
        piece: Parameters at a time that go through its own step.
    """
    own_step = inner.step
    inner.gradient_scale = 1.0
    planned: dict[int, tuple[list[tuple[int, ...]], list[Launch]]] = {}

    def launches(index: int, weights: list[Weight]) -> list[Launch]:
        addresses = addresses_of(weights)
        if index not in planned or planned[index][0] != addresses:
            planned[index] = addresses, plan_launches(weights)
        return planned[index][1]

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
                weights = [_weight(inner, p) for p in halved if _gradient(p) is not None]
                for launch in launches(index, weights):
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


def _weight(inner: Any, parameter: Any) -> Weight:
    state = inner.state[parameter]
    if not state:
        inner.initialize_state(parameter, True)
    return Weight(
        parameter, parameter.decoupled_grad, state["exp_avg"], state["exp_avg_sq"], state["master_param"]
    )


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
