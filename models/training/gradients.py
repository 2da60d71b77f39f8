# SPDX-License-Identifier: Apache-2.0
"""Scale, norm and clipping of Megatron's main gradients, over all parts of its optimizer.

Norm and clipping take a few kernels; who reads the norm waits for the device once. megatron-core does the same with
TransformerEngine's kernels, but imports one that 2.12 does not have, and then falls back to a loop that waits for every
single parameter.
"""

from typing import Any

import torch
from torch import Tensor, distributed


@torch.no_grad()
def prepare_gradients(optimizer: Any) -> bool:
    """Make main gradients of the model's, without the loss scale, and move the loss scale on.

    Under expert parallelism experts have a part of the optimizer of their own, with a loss scale of its own, though
    one scale goes into the loss. megatron-core moves each on by what that part saw: an overflow that only one has would
    leave the others at a scale that the loss was never multiplied with.

    Returns: whether any gradient of the whole model overflowed.
    """
    parts = optimizer.chained_optimizers
    overflows = [part.prepare_grads() for part in parts]
    if any(overflows):
        state = parts[overflows.index(True)].grad_scaler.state_dict()
        for part in parts:
            part.grad_scaler.load_state_dict(state)
    return any(overflows)


@torch.no_grad()
def gradient_square(optimizer: Any, device: torch.device) -> Tensor:
    """Sum of squares of all gradients of the whole model, the same on every rank; nobody waits for the device.

    Args:
        optimizer: Megatron's, gradients prepared.
        device: Where the gradients are.

    Returns: [] float32.
    """
    squares = []
    for part in optimizer.chained_optimizers:
        gradients = part.get_grads_for_grad_norm()
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        square = norm.float() ** 2
        distributed.all_reduce(square, group=part.get_grad_stats_parallel_group())
        squares.append(square)
    return torch.stack(squares).sum()


@torch.no_grad()
def scale_gradients(optimizer: Any, scale: float, norm: float) -> None:
    """Multiply all gradients by `scale`, and down to the optimizer's `clip_grad` where they are larger, in one pass or,
    where the optimizer can, in its next step.

    Args:
        optimizer: Megatron's, gradients prepared.
        scale: What makes a mean of sums.
        norm: Of the scaled gradients.
    """
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        limit = part.config.clip_grad
        factor = scale * min(1.0, limit / (norm + 1e-6)) if limit > 0 else scale
        # An optimizer of models.training.adamw_steps does it in its step.
        if hasattr(getattr(part, "optimizer", None), "gradient_scale"):
            part.optimizer.gradient_scale = factor
            continue
        gradients = _main_gradients(part)
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)


def _main_gradients(part: Any) -> list[Tensor]:
    name = (
        "decoupled_grad" if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    )  # where the precision-aware optimizer keeps gradients of another dtype than the parameter's
    found = (getattr(parameter, name, None) for parameter in part.get_parameters())
    return [gradient for gradient in found if gradient is not None]
