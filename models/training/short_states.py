# SPDX-License-Identifier: Apache-2.0
"""AdamW whose moments have 16 bits, without an fp32 copy of all of them while it steps.

TransformerEngine's AdamW unpacks the moments of a whole parameter group at once: 8 bytes a parameter, more than the
short states save. Here it gets a piece of the group at a time; what it computes for a parameter depends on no other.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

PIECE = 2**27
"""Parameters that a step unpacks at a time, one GiB of moments, unless a single tensor has more."""


def step_in_pieces(inner: Any, *, piece: int = PIECE) -> None:
    """Make an AdamW step through its groups piece by piece.

    Args:
        inner: TransformerEngine's AdamW, or one with its `param_groups`, each of which counts its own `step`.
        piece: Parameters at a time.
    """
    step: Callable[[], object] = inner.step

    def stepped(closure: None = None) -> None:
        assert closure is None
        groups = inner.param_groups
        try:
            for group in groups:
                for parameters in pieces(group["params"], piece):
                    inner.param_groups = [group | {"params": parameters}]
                    step()
                if group["params"]:
                    group["step"] = inner.param_groups[0]["step"]
        finally:
            inner.param_groups = groups

    inner.step = stepped


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
