# SPDX-License-Identifier: Apache-2.0
"""Vision work shared by the ranks that see the same micro-batch (context parallelism), instead of done by each.

    items       A  B  C  D  E        cut where half of the patches are, whole items only
    rank 0      A  B  C                tower  ─┐
    rank 1               D  E          tower  ─┴─ gathered: tokens and deepstack features of all items on every rank

Every rank uses the tokens of its own positions only, so the gradient of a token is summed over the ranks before it
goes back to the rank that made it.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, distributed

from models.common.fusion import with_zero_gradients

Tower = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def item_bounds(patches: Tensor, num_ranks: int) -> list[int]:
    """Cut items into as many stretches as there are ranks, each near an equal share of the patches.

    Args:
        patches: Of every item, [i], on the CPU.
        num_ranks: Stretches; one may be empty.

    Returns: First item of every rank, and the number of items: rank r has items bounds[r] to bounds[r + 1].
    """
    ends = patches.cumsum(0)
    shares = torch.arange(1, num_ranks) * int(ends[-1]) / num_ranks
    # An item belongs to the rank in whose share its middle lies.
    middles = ends - patches / 2
    return [0, *torch.searchsorted(middles, shares.to(middles.dtype), right=True).tolist(), len(patches)]


def see(
    tower: torch.nn.Module, pixel_values: Tensor, grid_thw: Tensor, *, num_levels: int, group: Any
) -> tuple[Tensor, list[Tensor]]:
    """Run the vision tower on this rank's share of the items and gather what all ranks made.

    Args:
        tower: Takes patches [p, c] and grids [i, 3]; gives tokens [m, h] and deepstack features, each [m, h].
        pixel_values: Patches of all items, [p, c].
        grid_thw: Grids of all items, [i, 3], on the CPU.
        num_levels: Deepstack features that the tower gives.
        group: Ranks that have the same micro-batch; of one rank, nothing is shared.

    Returns: Tokens [m, h] and features of all items, in reading order.
    """
    run = cast(Tower, tower)
    if group.size() == 1:
        return run(pixel_values, grid_thw)
    patches = grid_thw.prod(dim=1)
    bounds, ends = item_bounds(patches, group.size()), [0, *patches.cumsum(0).tolist()]
    first, last = bounds[group.rank()], bounds[group.rank() + 1]
    merge = cast(Any, tower).vision.spatial_merge_size ** 2
    counts = [(ends[bounds[rank + 1]] - ends[bounds[rank]]) // merge for rank in range(group.size())]
    if first == last:
        parameters = list(tower.parameters())
        width = cast(Any, tower).vision.out_hidden_size * (1 + num_levels)
        nothing = torch.zeros(0, width, dtype=parameters[0].dtype, device=pixel_values.device)
        made = with_zero_gradients(nothing, parameters)
    else:
        tokens, features = run(pixel_values[ends[first] : ends[last]], grid_thw[first:last])
        made = torch.cat([tokens, *features], dim=1)
    gathered = cast(Tensor, _GatherRows.apply(made, counts, group))
    tokens, *features = gathered.chunk(1 + num_levels, dim=1)
    return tokens.contiguous(), [feature.contiguous() for feature in features]


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, one rank's after the other's; backward sums over the ranks and takes this rank's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        padded = rows.new_zeros(max(counts), rows.shape[1])  # gloo gathers equal sizes only
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        total = grad_outputs[0].contiguous().clone()
        distributed.all_reduce(total, group=ctx.group)
        return total.split(ctx.counts)[ctx.group.rank()].contiguous(), None, None
