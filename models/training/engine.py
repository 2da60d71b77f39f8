# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of an engine. Two exist: Megatron (`megatron_engine`) and FSDP2 (`fsdp2`)."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import nn

from models.common.batch import Batch
from models.training.parallel import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """One rank's part of a loss: add both over the ranks that count, then divide."""

    loss: float = 0.0
    denominator: float = 0.0
    auxiliary: dict[str, float] = field(default_factory=dict)
    """This rank's part of losses that are not reported in `loss`; their sum over all ranks is the global mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What came of one optimizer step."""

    is_updated: bool
    """False: the weights stayed as they were."""
    grad_norm: float
    """Global L2 norm before clipping; not a number when it was not computed."""
    learning_rate: float
    loss_scale: float = 1.0
    is_overflow: bool = False
    """The step was skipped by dynamic loss scaling, as it should be from time to time."""
    extra: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A model with its optimizer and schedule, on this rank."""

    ranks: Ranks
    patches: tuple[str, ...]
    """What was changed in a library to run on this device, by name."""

    def learning_rate(self) -> float:
        """The rate that the next step will use."""
        ...

    def forward_backward(
        self, batches: list[Batch], *, denominator: float, num_padded_tokens: int
    ) -> LossSums:
        """Gradients of one global batch from this rank's micro-batches; both numbers are the global batch's."""
        ...

    def update(self) -> UpdateResult:
        """Clip, step the optimizer and the schedule. Leaves weights alone when gradients are not finite."""
        ...

    def discard(self) -> None:
        """Drop the gradients of this step; weights and schedule stay."""
        ...

    def evaluate(self, batches: list[Batch]) -> LossSums:
        """Loss sums of held-out micro-batches."""
        ...

    def num_parameters(self) -> dict[str, int]:
        """total, trainable, language, vision, audio: over the whole model, all ranks call it."""
        ...

    def save(self, folder: Path, *, with_optimizer: bool, is_async: bool) -> None:
        """Write weights, optimizer, schedule and generators into an existing folder; all ranks call it."""
        ...

    def trace_points(self) -> dict[str, nn.Module]:
        """Modules to record for a comparison, by their common names (:mod:`models.training.trace`)."""
        ...

    def gradient_scale(self, denominator: float) -> float:
        """What turns a recorded gradient into that of the global mean loss."""
        ...

    def is_save_finished(self, *, is_blocking: bool) -> bool:
        """Whether the last save is whole on every rank; waits for it when asked to. All ranks call it."""
        ...

    def close(self) -> None:
        """Let go of the process groups when the run is over: each keeps threads that poll."""
        ...

    def load(self, folder: Path, *, with_optimizer: bool, same_layout: bool) -> None:
        """Read what `save` wrote; all ranks call it."""
        ...


def mean_auxiliary(parts: list[LossSums]) -> dict[str, float]:
    """Auxiliary losses of the step."""
    names = sorted({name for part in parts for name in part.auxiliary})
    return {name: sum(part.auxiliary.get(name, 0.0) for part in parts) for name in names}


def mean_loss(parts: list[LossSums]) -> float:
    """Global loss from the parts of the ranks that count; not a number when nothing was supervised."""
    denominator = sum(part.denominator for part in parts)
    return sum(part.loss for part in parts) / denominator if denominator else math.nan
