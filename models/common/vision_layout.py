# SPDX-License-Identifier: Apache-2.0
"""Where every patch sits, and which patches attend to each other. Computed on the CPU from `grid_thw` alone.

Patches come in HF's order: frame by frame, merge block by merge block, m*m patches in each block. Loops go over
items, never over patches. What hangs on the size of a frame alone is kept: pictures of a dataset have few sizes, and a
GPU waits for the layout at the start of every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from models.contract.architecture import VisionArchitecture
from models.contract.errors import ShapeError

Ints = npt.NDArray[np.int64]
NUM_SIZES = 256
"""Sizes of frames that are kept, 64 bytes a patch."""


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """Layout of all patches of a micro-batch, in the order in which the layers see them."""

    order: Ints | None
    """Blocks in window order, [m]; None when the tower has no windows and nothing is moved."""
    restore: Ints | None
    """Puts merged tokens back into reading order, [m]; None with `order`."""
    rows_and_columns: Ints
    """[p, 2]."""
    frame_lengths: Ints
    """Patches of every frame."""
    window_lengths: Ints | None
    """Patches of every window; None without windows."""
    table_index: Ints | None
    """Four entries of the position table for every patch, [p, 4]; None without a table."""
    table_weight: npt.NDArray[np.float32] | None
    """Their bilinear weights, [p, 4]."""


def vision_layout(grid_thw: npt.NDArray[np.int64], vision: VisionArchitecture) -> VisionLayout:
    """Lay out the patches of all items.

    Args:
        grid_thw: Patches in time, height and width of every item, [i, 3].
        vision: The tower's sizes.

    Raises:
        ShapeError: a height or width is not a multiple of the merge size, or a grid is empty.
    """
    grids: list[tuple[int, int, int]] = [tuple(row) for row in grid_thw.tolist()]
    _check_grids(grids, vision.spatial_merge_size)
    merge = vision.spatial_merge_size
    places = _of_frames([_rows_and_columns(height, width, merge) for _, height, width in grids], grids)
    frame_lengths = np.repeat(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
    index = weight = None
    if vision.num_position_embeddings is not None:
        side = round(vision.num_position_embeddings**0.5)
        tables = [_table(height, width, merge, side) for _, height, width in grids]
        index, weight = (_of_frames(part, grids) for part in zip(*tables, strict=True))
    if vision.window_size is None:
        return VisionLayout(None, None, places, frame_lengths, None, index, weight)
    window = vision.window_size // vision.patch_size // merge
    order, windows = _window_order(grids, merge, window)
    patch_order = (order[:, None] * merge**2 + np.arange(merge**2)).ravel()
    return VisionLayout(
        order=order,
        restore=np.argsort(order),
        rows_and_columns=places[patch_order],
        frame_lengths=frame_lengths,
        window_lengths=windows * merge**2,
        table_index=None if index is None else index[patch_order],
        table_weight=None if weight is None else weight[patch_order],
    )


def _check_grids(grids: list[tuple[int, int, int]], merge: int) -> None:
    for number, (frames, height, width) in enumerate(grids):
        if min(frames, height, width) < 1 or height % merge or width % merge:
            raise ShapeError(
                "a visual item has an impossible grid",
                where=f"item {number} of the micro-batch, grid_thw",
                expected=f"positive sizes, height and width multiples of {merge}",
                got=f"{(frames, height, width)}",
                fix="resize the image to a multiple of patch_size * spatial_merge_size",
            )


def _block_order(values: npt.NDArray, merge: int) -> npt.NDArray:
    """Reorder [h, w, ...] so that the patches of a merge block are neighbours, [h*w, ...]."""
    height, width, *rest = values.shape
    blocks = values.reshape(height // merge, merge, width // merge, merge, *rest)
    return blocks.swapaxes(1, 2).reshape(height * width, *rest)


def _of_frames(parts: Sequence[npt.NDArray], grids: list[tuple[int, int, int]]) -> npt.NDArray:
    """Those of all frames, one item's behind another's, from one frame's of every item."""
    return np.concatenate(
        [part for part, (frames, _, _) in zip(parts, grids, strict=True) for _ in range(frames)]
    )


@lru_cache(NUM_SIZES)
def _rows_and_columns(height: int, width: int, merge: int) -> Ints:
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    return _kept(_block_order(places, merge))


@lru_cache(NUM_SIZES)
def _table(height: int, width: int, merge: int, side: int) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Entries and weights that stretch a side x side table over a frame, corners on corners."""
    row_taps, row_weights = _taps(height, side)
    column_taps, column_weights = _taps(width, side)
    index = row_taps[:, None, :, None] * side + column_taps[None, :, None, :]  # [h, w, 2, 2]
    weight = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    return tuple(  # type: ignore[return-value]
        _kept(_block_order(part.reshape(height, width, 4), merge)) for part in (index, weight)
    )


def _kept[Values: npt.NDArray](values: Values) -> Values:
    """For everybody, and so for nobody to write to."""
    values.flags.writeable = False
    return values


def _taps(size: int, side: int) -> tuple[Ints, npt.NDArray[np.float32]]:
    place = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(place)
    taps = np.stack([low, np.minimum(low + 1, side - 1)], axis=-1).astype(np.int64)
    upper = place - low
    return taps, np.stack([1 - upper, upper], axis=-1)


def _window_order(grids: list[tuple[int, int, int]], merge: int, window: int) -> tuple[Ints, Ints]:
    """Order of merge blocks that puts every window's together, and how many each window has.

    Windows do not cross frames; those at the lower and right edges are smaller.
    """
    orders, lengths, start = [], [], 0
    for frames, height, width in grids:
        frame, counts = _windows_of_frame(height // merge, width // merge, window)
        orders.append((start + np.arange(frames)[:, None] * len(frame) + frame).ravel())
        lengths.append(np.tile(counts, frames))
        start += frames * len(frame)
    return np.concatenate(orders), np.concatenate(lengths)


@lru_cache(NUM_SIZES)
def _windows_of_frame(rows: int, columns: int, window: int) -> tuple[Ints, Ints]:
    """Blocks of a frame in the order of its windows, and how many each window has."""
    windows_down, windows_across = -(-rows // window), -(-columns // window)
    window_of = (np.arange(rows) // window)[:, None] * windows_across + np.arange(columns) // window
    order = np.argsort(window_of, axis=None, kind="stable")
    return _kept(order), _kept(np.bincount(window_of.ravel(), minlength=windows_down * windows_across))
