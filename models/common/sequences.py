# SPDX-License-Identifier: Apache-2.0
"""From media and text to one sequence: placeholders expanded, positions given, labels shifted. For every family.

A rendered chat holds one placeholder token a *run*. A run becomes many tokens: an image, a video (or one frame of
it), an audio clip::

    text   … <|vision_start|> <|image_pad|>       <|vision_end|> …
    ids    … vs               I I I I I I         ve …
    t      … 7                8 8 8 8 8 8         11          an image takes as many positions as its longer side
    h      … 7                8 8 8 9 9 9         11
    w      … 7                8 9 10 8 9 10       11
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.common.batch import IGNORED_LABEL
from models.contract.architecture import SpecialTokens
from models.contract.errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRun:
    """What one placeholder becomes."""

    ids: Tensor
    """[n] int64: placeholder tokens, one a merged vision token or audio token."""
    offsets: Tensor
    """[3, n]: position ids counted from where the run begins. int64; float32 where a clock is not whole."""
    advance: float
    """By how much the next token's position lies behind the run's beginning; whole unless a clock is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaItem:
    """One processed image, video or audio clip."""

    kind: Literal["image", "video", "audio"]
    text: str
    """What stands in the text instead of its single placeholder token; holds one placeholder a run."""
    runs: tuple[MediaRun, ...]
    pixel_values: Tensor | None = None
    """[p, c] float32."""
    grid_thw: tuple[int, int, int] | None = None
    input_features: Tensor | None = None
    """[mel, a] float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSample:
    """One sequence, ready to be batched or packed. Labels are shifted already."""

    key: str
    input_ids: Tensor
    """[s] int64."""
    labels: Tensor
    """[s] int64; -100 is ignored."""
    position_ids: Tensor
    """[3, s] int64, or float32 where a clock is not whole."""
    vision_positions: Tensor
    """[m] int64: index of every visual placeholder."""
    audio_positions: Tensor
    """[m] int64: index of every audio placeholder."""
    items: tuple[MediaItem, ...] = ()

    @property
    def length(self) -> int:
        """Real tokens."""
        return self.input_ids.numel()

    @property
    def num_vision_tokens(self) -> int:
        """Merged vision tokens."""
        return self.vision_positions.numel()

    @property
    def nbytes(self) -> int:
        """Memory of its tensors, for caches that are bounded."""
        media = (t for item in self.items for t in (item.pixel_values, item.input_features) if t is not None)
        own = (self.input_ids, self.labels, self.position_ids, self.vision_positions, self.audio_positions)
        return sum(tensor.nbytes for tensor in (*own, *media))


def grid_run(
    token: int,
    grid_t: int,
    grid_h: int,
    grid_w: int,
    *,
    seconds_to_t: float = 1.0,
    time: Tensor | None = None,
    advance: float | None = None,
) -> MediaRun:
    """Run of one visual item with merged grid [grid_t, grid_h, grid_w].

    Args:
        token: Placeholder id.
        grid_t: Temporal patches.
        grid_h: Rows of merged vision tokens.
        grid_w: Columns of merged vision tokens.
        seconds_to_t: Step of the time axis between temporal patches.
        time: [grid_t] time index of each temporal patch, instead of `seconds_to_t`.
        advance: Default: the longer of height and width.
    """
    t = torch.arange(grid_t) * int(seconds_to_t) if time is None else time
    h, w = torch.arange(grid_h, dtype=t.dtype), torch.arange(grid_w, dtype=t.dtype)
    offsets = torch.stack(torch.meshgrid(t, h, w, indexing="ij")).reshape(3, -1)  # [3, t*h*w]
    ids = torch.full((grid_t * grid_h * grid_w,), token)
    return MediaRun(ids=ids, offsets=offsets, advance=max(grid_h, grid_w) if advance is None else advance)


def line_run(token: int, count: int) -> MediaRun:
    """Run of `count` tokens with text-like positions (audio)."""
    return MediaRun(ids=torch.full((count,), token), offsets=torch.arange(count).expand(3, -1), advance=count)


def expand_runs(
    ids: Tensor, is_placeholder: Tensor, runs: Sequence[MediaRun], *, where: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace every placeholder by its run.

    Args:
        ids: Token ids with one placeholder a run, [n].
        is_placeholder: Where the placeholders are, [n] bool.
        runs: One for each placeholder, in order.
        where: Whose tokens these are, for the error.

    Returns:
        Expanded ids [s], their source index into `ids` [s], and position ids [3, s].

    Raises:
        ShapeError: placeholder and run counts differ.
    """
    places = is_placeholder.nonzero().flatten()
    if places.numel() != len(runs):
        raise ShapeError(
            "placeholders and media differ", where=where,
            expected=f"{len(runs)} placeholder(s), one for each image, video part or audio clip",
            got=str(places.numel()), fix="give every placeholder its medium, or drop the sample",
        )  # fmt: skip
    offsets = torch.cat([run.offsets for run in runs], dim=1) if runs else None  # [3, tokens of runs]
    advance, count = torch.ones_like(ids), torch.ones_like(ids)
    if offsets is not None:
        advance = advance.to(offsets.dtype)
        advance[places] = torch.tensor([run.advance for run in runs], dtype=offsets.dtype)
        count[places] = torch.tensor([run.ids.numel() for run in runs])
    start = advance.cumsum(0) - advance  # [n] position of the first token of each source token
    source = torch.arange(ids.numel()).repeat_interleave(count)  # [s]
    expanded, positions = ids[source], start[source].expand(3, -1)  # [s], [3, s]
    if offsets is not None:
        of_run = is_placeholder[source]
        expanded[of_run] = torch.cat([run.ids for run in runs])
        positions = positions.clone()
        positions[:, of_run] += offsets
    return expanded, source, positions.contiguous()


def encode_sample(
    key: str, ids: Tensor, supervised: Tensor, items: Sequence[MediaItem], tokens: SpecialTokens
) -> EncodedSample:
    """Expand one chat's placeholders, give positions, and shift its labels.

    Args:
        key: Sample key.
        ids: Token ids with one placeholder a run, [n] int64.
        supervised: Tokens that are targets, [n] bool.
        items: Media in reading order.
        tokens: The model's special tokens.

    Raises:
        ShapeError: placeholder and run counts differ; it names the sample.
    """
    vision = torch.tensor([tokens.image, tokens.video])
    audio = torch.tensor([] if tokens.audio is None else [tokens.audio], dtype=torch.int64)
    runs = [run for item in items for run in item.runs]
    is_placeholder = torch.isin(ids, torch.cat([vision, audio]))
    expanded, source, positions = expand_runs(ids, is_placeholder, runs, where=f"sample {key}")
    target = torch.where(supervised[source], expanded, IGNORED_LABEL)
    return EncodedSample(
        key=key,
        input_ids=expanded,
        labels=torch.cat([target[1:], target.new_full((1,), IGNORED_LABEL)]),
        position_ids=positions,
        vision_positions=torch.isin(expanded, vision).nonzero().flatten(),
        audio_positions=torch.isin(expanded, audio).nonzero().flatten(),
        items=tuple(items),
    )


def truncate_sequence(sample: EncodedSample, length: int) -> EncodedSample | None:
    """Cut the tail off; None where the cut would lose a medium or leave nothing to learn."""
    if sample.length <= length:
        return sample
    media = torch.cat([sample.vision_positions, sample.audio_positions])
    labels = sample.labels[:length].clone()
    labels[-1] = IGNORED_LABEL  # its target was cut off
    if (media >= length).any() or not (labels != IGNORED_LABEL).any():
        return None
    return EncodedSample(
        key=sample.key, input_ids=sample.input_ids[:length].clone(), labels=labels,
        position_ids=sample.position_ids[:, :length].clone(), vision_positions=sample.vision_positions,
        audio_positions=sample.audio_positions, items=sample.items,
    )  # fmt: skip
