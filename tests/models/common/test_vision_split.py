# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from torch import distributed

from models.common.vision_split import item_bounds, see
from models.parity.single import make_pair


@pytest.mark.parametrize(
    ("patches", "ranks", "bounds"),
    [
        ([4, 4, 4, 4], 2, [0, 2, 4]),
        ([100, 4, 4], 2, [0, 1, 3]),
        ([4, 4, 100], 2, [0, 2, 3]),
        ([8], 2, [0, 1, 1]),
        ([8], 4, [0, 0, 1, 1, 1]),
        ([6, 6, 6, 6, 6, 6], 3, [0, 2, 4, 6]),
    ],
)
def test_items_are_cut_where_the_shares_of_patches_are(
    patches: list[int], ranks: int, bounds: list[int]
) -> None:
    found = item_bounds(torch.tensor(patches), ranks)
    assert found[0] == 0
    assert found[-1] == len(patches)
    assert found == sorted(found)
    assert found == bounds


def test_no_rank_has_much_more_than_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        patches = torch.randint(4, 400, (40,), generator=generator)
        bounds = item_bounds(patches, 4)
        shares = [int(patches[a:b].sum()) for a, b in itertools.pairwise(bounds)]
        assert max(shares) - int(patches.sum()) / 4 <= int(patches.max())


@pytest.mark.usefixtures("single_process")
def test_one_rank_runs_the_tower_on_everything() -> None:
    pair = make_pair("qwen3_vl")
    made, _ = pair.case("images")
    pixels, grids = made.batch.pixel_values, made.batch.grid_thw
    assert pixels is not None
    assert grids is not None
    tower = pair.model.vision_model
    group = distributed.group.WORLD
    tokens, features = see(tower, pixels, grids, num_levels=3, group=group)
    wanted, wanted_features = tower(pixels, grids)
    torch.testing.assert_close(tokens, wanted)
    torch.testing.assert_close(features, wanted_features)
