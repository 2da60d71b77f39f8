# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of exact, stated shapes that are read from nowhere: what timing runs on.

Ids and pixels are random, sizes are real. Images come first in each sample, each after one text token. Positions simply
count in all three dimensions, where a real image has those of its rows and columns: as much work, another result. Every
text position has a label, a random one at the end of a sample and before an image.
"""

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.common.batch import IGNORED_LABEL, Batch
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.fixed_shapes import merged_tokens
from models.contract.recipe import FIXED_SHAPES, DataSection

MAX_WORDS = 50_000
"""Different text ids that are drawn: as many as common text has, whatever the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """Shape of one micro-batch, which is one row."""

    seq_length: int
    num_samples: int = 1
    """More than one: a packed row of equal samples."""
    num_images: int = 0
    image_size: int = 448
    """Side of a square image in pixels; a multiple of patch_size * spatial_merge_size."""

    def __str__(self) -> str:
        images = f", {self.num_images} image(s) of {self.image_size}²" if self.num_images else ""
        return f"{self.num_samples} sample(s) in {self.seq_length} tokens{images}"


def row_shape(data: DataSection) -> RowShape:
    """The shape that a recipe states."""
    assert data.fixed_shapes is not None
    shapes = data.fixed_shapes
    return RowShape(
        seq_length=data.seq_length, num_samples=shapes.samples, num_images=shapes.images,
        image_size=shapes.image_size,
    )  # fmt: skip


class FixedRows:
    """Endless rows of one shape for one data-parallel rank, as a source of :class:`models.datasets.loader.BatchLoader`.

    Rows are numbered over all ranks and dealt out in turn, so that a global batch holds the same rows on any number of
    ranks. A row's words follow from seed and number; the pixels are the same in every row, as drawing tens of megabytes
    for each would be timed with the step.
    """

    def __init__(
        self, architecture: Architecture, shape: RowShape, *, seed: int, rank: int, size: int
    ) -> None:
        self._architecture, self._seed, self._rank, self._size = architecture, seed, rank, size
        self._template = fixed_batch(architecture, shape, seed=seed)
        self._num_taken = 0

    def next_sample(self) -> Batch:
        """The next row, a whole micro-batch."""
        row = self._num_taken * self._size + self._rank
        self._num_taken += 1
        return with_words(self._template, self._architecture, name=f"{self._seed}-{row}")

    def close(self) -> None:
        """Nothing is held open between two rows."""

    def state(self) -> Any:
        """Rows that all ranks together have taken, as plain JSON: the same on every rank between two steps."""
        return {"rows": self._num_taken * self._size}

    def restore(self, state: Any) -> None:
        """Go to where `state` was taken, on this number of ranks or on another."""
        self._num_taken = state["rows"] // self._size


def fixed_batch(architecture: Architecture, shape: RowShape, *, seed: int = 0) -> Batch:
    """Make one micro-batch, on the CPU.

    Raises:
        ConfigError: the shape does not divide, or its images do not fit.
    """
    _require_fit(architecture, shape)
    vision, s = architecture.vision, shape.seq_length
    length, num_images = s // shape.num_samples, shape.num_images
    merged = merged_tokens(vision, shape.image_size)
    is_vision = torch.zeros(shape.num_samples, length, dtype=torch.bool)
    for image in range(num_images // shape.num_samples):
        start = image * (merged + 1) + 1
        is_vision[:, start : start + merged] = True
    is_vision = is_vision.reshape(1, s)  # [n, s/n] -> [1, s]
    side = shape.image_size // vision.patch_size
    pixels = (num_images * side**2, vision.patch_dim)
    is_packed, has_images = shape.num_samples > 1, num_images > 0
    batch = Batch(
        input_ids=torch.where(is_vision, architecture.tokens.image, 0),
        labels=torch.where(is_vision, IGNORED_LABEL, 0),
        position_ids=torch.arange(length).repeat(shape.num_samples).expand(3, 1, s).contiguous(),
        pixel_values=torch.randn(pixels, generator=_generator(f"{seed}: pixels")) if has_images else None,
        grid_thw=torch.tensor([[1, side, side]] * num_images) if has_images else None,
        vision_positions=is_vision.flatten().nonzero().flatten() if has_images else None,
        cu_seqlens=torch.arange(0, s + 1, length, dtype=torch.int32) if is_packed else None,
        max_seqlen=length if is_packed else 0,
        sample_lengths=(length,) * shape.num_samples,
        num_real_tokens=s,
        num_supervised_tokens=int((~is_vision).sum()),
        num_images=num_images,
    )
    return with_words(batch, architecture, name=f"{seed}-0")


def with_words(batch: Batch, architecture: Architecture, *, name: str) -> Batch:
    """The same row with words and keys of its own; both follow from `name`."""
    assert batch.labels is not None
    words = _draw_words(architecture, batch.input_ids.shape, _generator(name))
    is_text = batch.labels != IGNORED_LABEL
    return dataclasses.replace(
        batch,
        input_ids=torch.where(is_text, words, batch.input_ids),
        labels=torch.where(is_text, words.roll(-1, 1), batch.labels),
        sample_keys=tuple(f"{FIXED_SHAPES}-{name}-{index}" for index in range(len(batch.sample_lengths))),
    )


def _draw_words(architecture: Architecture, size: torch.Size, generator: torch.Generator) -> Tensor:
    """Random ids from the larger of the two ranges beside the special tokens."""
    special = [number for number in dataclasses.astuple(architecture.tokens) if number is not None]
    below, above = (0, min(special)), (max(special) + 1, architecture.text.vocab_size)
    first, end = max(below, above, key=lambda bounds: min(bounds[1] - bounds[0], MAX_WORDS))
    return torch.randint(first, min(end, first + MAX_WORDS), size, generator=generator)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _require_fit(architecture: Architecture, shape: RowShape) -> None:
    vision = architecture.vision
    multiple = vision.patch_size * vision.spatial_merge_size
    samples = shape.num_samples
    images = shape.num_images // samples
    room = images * (merged_tokens(vision, shape.image_size) + 1)
    problems = {
        f"tokens and images that {samples} sample(s) share evenly": shape.seq_length % samples
        or shape.num_images % samples,
        f"an image_size that is a multiple of {multiple}": shape.num_images and shape.image_size % multiple,
        f"more than {room} tokens a sample, for its {images} image(s)": room >= shape.seq_length // samples,
    }
    broken = [expected for expected, is_broken in problems.items() if is_broken]
    if broken:
        raise ConfigError(
            "a row of this shape cannot be made", where="[data.fixed_shapes]", expected="; ".join(broken),
            got=str(shape), fix="change seq_length, samples, images or image_size",
        )  # fmt: skip
