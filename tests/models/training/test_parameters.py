# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace
from typing import Any

from torch import nn

from models.training.parameters import parameter_order


def order(*stages: list[Any], times: int = 1) -> str:
    """Of the last stage's rank, on so many data-parallel ranks."""
    digests: list[str] = []
    found = ""
    for modules in stages * times:
        parameter_order(modules, SimpleNamespace(exchange=lambda mine: digests.append(mine) or [mine]))  # type: ignore[arg-type]
    for modules in stages:
        found = parameter_order(modules, SimpleNamespace(exchange=lambda _: list(digests)))  # type: ignore[arg-type]
    return found


def test_order_hangs_on_names_shapes_and_what_is_trained() -> None:
    def layer(**parts: nn.Module) -> list[Any]:
        return [nn.ModuleDict(parts)]

    norm, linear = nn.LayerNorm(4), nn.Linear(4, 8)
    plain = order(layer(norm=norm, linear=linear))
    assert plain == order(layer(norm=nn.LayerNorm(4), linear=nn.Linear(4, 8)))
    frozen = nn.Linear(4, 8).requires_grad_(False)
    others = [
        layer(linear=linear, norm=norm),
        layer(norm=norm, other=linear),
        layer(norm=norm, linear=nn.Linear(4, 9)),
        layer(norm=norm, linear=frozen),
        layer(norm=norm, linear=linear, more=nn.Linear(1, 1)),
    ]
    assert len({plain, *map(order, others)}) == 6


def test_order_is_one_for_all_ranks_and_any_number_of_data_parallel_ones() -> None:
    first, last = [nn.Linear(4, 8)], [nn.Linear(8, 4)]
    assert order(first, last) == order(last, first) == order(first, last, times=3)
    assert order(first, last) != order(first, first)
