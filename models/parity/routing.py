# SPDX-License-Identifier: Apache-2.0
"""Which experts every token goes to: recorded from either side, and dictated to either side.

A router's score rounded to bf16 or TF32 can send a token to another expert than fp32 does. What that token becomes then
differs by as much as two experts do, which says nothing about the arithmetic. With the experts that transformers
chose in fp32 dictated to both sides, what is left is rounding; how many tokens would have gone elsewhere is counted.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor
from torch.nn import Module

Routing = Sequence[Tensor]
"""For every layer with experts, in order, the experts of every position: [b*s, k] int64, row after row."""


@contextlib.contextmanager
def recorded_oracle(oracle: Module) -> Iterator[list[Tensor]]:
    """Collect the experts that a transformers model chooses in one forward pass."""
    found: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _, __, out: found.append(out[2].detach()))
        for router in _oracle_routers(oracle)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def dictated_oracle(oracle: Module, routing: Routing) -> Iterator[None]:
    """Let a transformers model use these experts, weighted by its own scores."""
    hooks = [
        router.register_forward_hook(_Dictate(experts))
        for router, experts in zip(_oracle_routers(oracle), routing, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Dictate:
    """Put other experts into a transformers router's output, and the softmax of its own scores over them."""

    def __init__(self, experts: Tensor) -> None:
        self.experts = experts

    def __call__(
        self, _: Module, __: Any, out: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = out[0]
        weights = logits.gather(1, self.experts).softmax(dim=-1, dtype=torch.float32)
        return logits, weights.to(logits.dtype), self.experts


def _oracle_routers(oracle: Module) -> list[Module]:
    return [module for module in oracle.modules() if type(module).__name__.endswith("TopKRouter")]


@contextlib.contextmanager
def recorded(model: Module, num_rows: int) -> Iterator[list[Tensor]]:
    """Collect the experts that our model chooses in the last forward pass, complete at the end of the block.

    Args:
        model: On one process.
        num_rows: Rows of the micro-batch.
    """
    found: list[Tensor] = []
    with _replayed(model, RouterReplayAction.RECORD) as replays:
        yield found
        for replay in replays:
            experts = replay.get_recorded_indices()
            assert experts is not None
            found.append(experts.detach().cpu().unflatten(0, (-1, num_rows)).transpose(0, 1).flatten(0, 1))


@contextlib.contextmanager
def dictated(model: Module, routing: Routing, num_rows: int) -> Iterator[None]:
    """Let our model use these experts, weighted by its own scores.

    Args:
        model: On one process.
        routing: Experts of the positions of the micro-batch as it is laid out.
        num_rows: Its rows.
    """
    with _replayed(model, RouterReplayAction.REPLAY_FORWARD) as replays:
        for replay, experts in zip(replays, routing, strict=True):
            # Our hidden states are [s, b, h].
            replay.set_target_indices(experts.unflatten(0, (num_rows, -1)).transpose(0, 1).flatten(0, 1))
        yield


@contextlib.contextmanager
def _replayed(model: Module, action: RouterReplayAction) -> Iterator[list[RouterReplay]]:
    """Give every router megatron-core's replay, which it has otherwise only where the config asks for it."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    replays = [RouterReplay() for _ in routers]
    for router, replay in zip(routers, replays, strict=True):
        replay.set_router_replay_action(action)
        router.router_replay = replay
    try:
        yield replays
    finally:
        for router in routers:
            router.router_replay = None
        RouterReplay.clear_global_router_replay_instances()


def num_elsewhere(routing: Routing, other: Routing, is_real: Tensor) -> tuple[int, int]:
    """Tokens that go to other experts in any layer, and tokens there are.

    Args:
        routing: Of one side.
        other: Of the other side.
        is_real: [b, s] bool: positions that are not padding.
    """
    moved = torch.zeros(is_real.numel(), dtype=torch.bool)
    for one, two in zip(routing, other, strict=True):
        moved |= (one.sort(dim=1).values != two.sort(dim=1).values).any(dim=1)
    return int(moved[is_real.flatten()].sum()), int(is_real.sum())
