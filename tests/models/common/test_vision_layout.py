# SPDX-License-Identifier: Apache-2.0
"""Places of patches against transformers' own index functions, on odd grids."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from models.common.vision_layout import VisionLayout, vision_layout
from models.contract.architecture import VisionArchitecture
from models.contract.errors import ShapeError

VISION = VisionArchitecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, patch_size=14, temporal_patch_size=2,
    spatial_merge_size=2, in_channels=3, out_hidden_size=40, hidden_act="silu", gated_linear_unit=True,
    normalization="RMSNorm", layernorm_epsilon=1e-6, patch_embed_bias=False,
)  # fmt: skip
WINDOWED = dataclasses.replace(VISION, window_size=112, fullatt_block_indexes=(3,))
TABLE = dataclasses.replace(VISION, num_position_embeddings=49)
GRIDS = [
    [[1, 2, 2]],
    [[1, 8, 8]],
    [[1, 18, 6], [3, 4, 22]],
    [[2, 2, 50], [1, 14, 16], [1, 2, 2], [5, 10, 12]],
]


@pytest.mark.parametrize("grids", GRIDS)
def test_rows_columns_and_frames_equal_transformers(grids: list[list[int]]) -> None:
    grid = torch.tensor(grids)
    layout = vision_layout(grid.numpy(), VISION)
    np.testing.assert_array_equal(layout.rows_and_columns, get_vision_position_ids(grid, 2).numpy())
    np.testing.assert_array_equal(layout.frame_lengths.cumsum(), get_vision_cu_seqlens(grid).numpy()[1:])


@pytest.mark.parametrize("grids", GRIDS)
def test_windows_equal_transformers(grids: list[list[int]]) -> None:
    grid = torch.tensor(grids)
    layout = vision_layout(grid.numpy(), WINDOWED)
    order, bounds = get_vision_window_index(grid, 2, 112, 14)
    assert layout.order is not None
    assert layout.window_lengths is not None
    assert layout.restore is not None
    np.testing.assert_array_equal(layout.order, order.numpy())
    np.testing.assert_array_equal(layout.window_lengths.cumsum(), np.unique(bounds.numpy())[1:])
    np.testing.assert_array_equal(layout.order[layout.restore], np.arange(len(layout.order)))


@pytest.mark.parametrize("grids", GRIDS)
def test_table_equals_transformers(grids: list[list[int]]) -> None:
    grid = torch.tensor(grids)
    layout = vision_layout(grid.numpy(), TABLE)
    index, weight = get_vision_interpolation_indices_and_weights(
        grid, 7, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    table = np.random.default_rng(0).normal(size=(49, 3)).astype(np.float32)
    ours = (table[layout.table_index] * layout.table_weight[..., None]).sum(1)
    theirs = (table[index.numpy()] * weight.numpy()[..., None]).sum(1)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)  # sums of four in another order


@pytest.mark.parametrize("grid", [[1, 3, 4], [1, 4, 5], [0, 4, 4], [1, 0, 4]])
def test_impossible_grid_names_the_item(grid: list[int]) -> None:
    with pytest.raises(ShapeError, match="item 1 of the micro-batch"):
        vision_layout(np.array([[1, 4, 4], grid]), VISION)


@pytest.mark.parametrize("vision", [TABLE, dataclasses.replace(TABLE, window_size=112)])
@pytest.mark.parametrize("items", [[[1, 8, 12]], [[1, 8, 12], [3, 4, 4], [1, 8, 12]]])
def test_nobody_writes_to_what_is_kept_for_the_next_layout(
    vision: VisionArchitecture, items: list[list[int]]
) -> None:
    grids = np.array(items)
    names = [field.name for field in dataclasses.fields(VisionLayout)]
    before = {name: getattr(vision_layout(grids, vision), name) for name in names}
    kept = {name: None if part is None else part.copy() for name, part in before.items()}
    for part in before.values():
        if part is not None:
            part[:] = 0
    for name, part in kept.items():
        found = getattr(vision_layout(grids, vision), name)
        assert (found is None) == (part is None)
        assert part is None or np.array_equal(found, part), name
