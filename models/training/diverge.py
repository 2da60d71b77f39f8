# SPDX-License-Identifier: Apache-2.0
"""Where two runs part: the first step by their metrics, then the first module and tensor of one step.

    first_step        reads two run directories: same samples? same schedule? then loss and gradient norm
    record_tensors    runs a model with hooks: outputs forward, gradients backward, in the order they appear
    first_tensor      compares two such recordings and names the first that differs, with the distance

The two models may be two engines, two layouts or two commits; `names` maps the second one's module names to the first
one's, so that transformers can be compared with Megatron.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.contract.errors import RunError
from models.contract.record import iter_metrics

EXACT_FIELDS = ("sample_digest", "learning_rate", "global_batch_size", "num_supervised_tokens")
"""Fields that must be equal: when one of them differs the runs did different things, whatever their losses."""
MEASURED_FIELDS = ("lm_loss", "grad_norm", "eval_lm_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDifference:
    """First step at which two runs differ, and in what."""

    iteration: int
    field: str
    first: Any
    second: Any
    relative: float | None
    """Relative distance; None for fields that must be equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """First tensor at which two recordings differ."""

    phase: str
    """forward or backward."""
    module: str
    relative: float
    """Largest absolute difference over the largest absolute value of the first; infinite for another shape."""
    first_shape: tuple[int, ...]
    second_shape: tuple[int, ...]


def first_step(first: Path, second: Path, *, tolerance: float = 0.0) -> StepDifference | None:
    """First iteration at which two run directories differ by more than `tolerance` (relative); None if none does.

    Raises:
        RunError: a directory has no metrics, or the runs share no iteration.
    """
    rows = [{row["iteration"]: row for row in iter_metrics(folder)} for folder in (first, second)]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise RunError("the runs share no iteration", where=f"{first} and {second}", fix="check the paths")
    for iteration in shared:
        a, b = rows[0][iteration], rows[1][iteration]
        for field in EXACT_FIELDS:
            if a[field] != b[field]:
                return StepDifference(
                    iteration=iteration, field=field, first=a[field], second=b[field], relative=None
                )
        for field in MEASURED_FIELDS:
            distance = _relative(a[field], b[field])
            if not distance <= tolerance:
                return StepDifference(
                    iteration=iteration, field=field, first=a[field], second=b[field], relative=distance
                )
    return None


@contextmanager
def record_tensors(
    model: nn.Module, select: Callable[[str], bool] = bool
) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Record what every selected module puts out, and the gradient that comes back to it, while the block runs.

    A module that runs several times keeps its first output. Tensors are detached copies in fp32 on the CPU, under
    ``("forward" or "backward", module name)`` in the order they appeared.
    """
    found: dict[tuple[str, str], Tensor] = {}

    def keep(phase: str, name: str, tensor: Tensor) -> None:
        found.setdefault((phase, name), tensor.detach().float().cpu().clone())

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return
            keep("forward", name, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: keep("backward", name, gradient))

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if select(name)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(
    first: Mapping[tuple[str, str], Tensor],
    second: Mapping[tuple[str, str], Tensor],
    *,
    tolerance: float,
    names: Callable[[str], str] = lambda name: name,
) -> TensorDifference | None:
    """First tensor of `first`, in its order, that differs in `second` by more than `tolerance`; None if none does.

    Layouts that differ only in order of axes, such as [s, b, h] and [b, s, h], are brought together.

    Raises:
        RunError: the recordings share no tensor: the names do not fit.
    """
    renamed = {(phase, names(name)): tensor for (phase, name), tensor in second.items()}
    shared = [key for key in first if key in renamed]
    if not shared:
        raise RunError("the recordings share no module", fix="map the second one's module names with `names`")
    for key in shared:
        a, b = first[key], _alike(renamed[key], first[key].shape)
        distance = _distance(a, b)
        if not distance <= tolerance:
            return TensorDifference(
                phase=key[0], module=key[1], relative=distance,
                first_shape=tuple(a.shape), second_shape=tuple(renamed[key].shape),
            )  # fmt: skip
    return None


def _alike(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape and tensor.ndim >= 2 and tensor.transpose(0, 1).shape == shape:
        return tensor.transpose(0, 1)
    return tensor


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = float(a.abs().max()) if a.numel() else 0.0
    gap = float((a - b).abs().max()) if a.numel() else 0.0
    return gap / scale if scale else gap


def _relative(a: Any, b: Any) -> float:
    if a == b:
        return 0.0
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b))
