# SPDX-License-Identifier: Apache-2.0
"""Exchanges that overlap with the passes, in one order on all data-parallel ranks, whatever media each of them has.

megatron-core begins an exchange where the passes come by: weights are gathered before the first module that needs
them, gradients are added up as soon as all of a bucket are there. A rank whose samples have no media takes no tower on
its way forward, and gives the tower's parameters their zeros in another order on its way back. Beside a rank that has
media it would exchange other buckets, or fewer: both wait forever, or one takes the other's numbers for its own.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

EMBEDDING = "embedding.word_embeddings.weight"
"""The parameter that gets its gradient last, after the towers."""


def start_gathers(chunks: Iterable[Any]) -> None:
    """Begin to gather the weights that other data-parallel ranks stepped, in the order in which the model takes them.

    Args:
        chunks: Wrapped in megatron-core's data parallelism.
    """
    for group in _gathering(chunks):
        if not group.param_gather_dispatched:
            group.start_param_sync()


def finish_gathers(chunks: Iterable[Any]) -> None:
    """Wait for the weights that no module has waited for: a step without media takes no tower."""
    for group in _gathering(chunks):
        if group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)  # waits, where a gather is under way


def exchange_in_turn(chunk: Any) -> None:
    """Have each bucket of gradients wait for its turn where their exchange overlaps with the backward pass.

    Args:
        chunk: Wrapped in megatron-core's data parallelism.
    """
    if not chunk.ddp_config.overlap_grad_reduce:
        return
    last = {
        id(chunk.param_to_bucket_group[parameter])
        for name, parameter in chunk.module.named_parameters()
        if name.endswith(EMBEDDING) and parameter.requires_grad
    }
    for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
        _Turns(sorted(groups, key=lambda group: id(group) in last))


class _Turns:
    """Bucket groups that begin their exchange in a given order: the full ones before their turn wait."""

    def __init__(self, order: Sequence[Any]) -> None:
        self._order, self._next = order, 0
        self._waiting: dict[int, bool] = {}
        for group in order:
            group.start_grad_sync = partial(self._start, group)

    def _start(self, group: Any, force_all_reduce: bool | None = False) -> None:
        if group.is_first_batch:  # nothing overlaps yet: megatron-core goes through them all, in their order
            type(group).start_grad_sync(group, force_all_reduce)
            return
        self._waiting[id(group)] = bool(force_all_reduce)
        while id(turn := self._order[self._next]) in self._waiting:
            type(turn).start_grad_sync(turn, self._waiting.pop(id(turn)))
            self._next = (self._next + 1) % len(self._order)


def _gathering(chunks: Iterable[Any]) -> list[Any]:
    """Bucket groups whose gathers overlap with the forward pass, in its order; none where they do not."""
    return [
        group
        for chunk in chunks
        if chunk.ddp_config.overlap_param_gather
        for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups)
        for group in reversed(groups)
    ]
