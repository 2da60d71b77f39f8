# SPDX-License-Identifier: Apache-2.0
"""From media and text to one sequence, and from sequences to a :class:`Batch`. Shared by every family's ``data.py``.

A rendered chat holds one placeholder token a *run*. A run becomes many tokens: an image, a video (or one frame of
it), an audio clip::

    text   … <|vision_start|> <|image_pad|>       <|vision_end|> …
    ids    … vs               I I I I I I         ve …
    t      … 7                8 8 8 8 8 8         11          an image takes as many positions as its longer side
    h      … 7                8 8 8 9 9 9         11
    w      … 7                8 9 10 8 9 10       11
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.common.batch import IGNORED_LABEL, Batch
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
    ids: Tensor, is_placeholder: Tensor, runs: Sequence[MediaRun]
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace every placeholder by its run.

    Args:
        ids: Token ids with one placeholder a run, [n].
        is_placeholder: Where the placeholders are, [n] bool.
        runs: One for each placeholder, in order.

    Returns:
        Expanded ids [s], their source index into `ids` [s], and position ids [3, s].

    Raises:
        ShapeError: placeholder and run counts differ.
    """
    where = is_placeholder.nonzero().flatten()
    if where.numel() != len(runs):
        raise ShapeError(
            "placeholders and media differ", expected=f"{len(runs)} placeholder(s)", got=str(where.numel())
        )
    offsets = torch.cat([run.offsets for run in runs], dim=1) if runs else None  # [3, tokens of runs]
    advance, count = torch.ones_like(ids), torch.ones_like(ids)
    if offsets is not None:
        advance = advance.to(offsets.dtype)
        advance[where] = torch.tensor([run.advance for run in runs], dtype=offsets.dtype)
        count[where] = torch.tensor([run.ids.numel() for run in runs])
    start = advance.cumsum(0) - advance  # [n] position of the first token of each source token
    source = torch.arange(ids.numel()).repeat_interleave(count)  # [s]
    expanded, positions = ids[source], start[source].expand(3, -1)  # [s], [3, s]
    if offsets is not None:
        of_run = is_placeholder[source]
        expanded[of_run] = torch.cat([run.ids for run in runs])
        positions = positions.clone()
        positions[:, of_run] += offsets
    return expanded, source, positions.contiguous()


def encode_sequence(
    key: str,
    ids: Tensor,
    supervised: Tensor,
    items: Sequence[MediaItem],
    *,
    vision_tokens: Sequence[int],
    audio_tokens: Sequence[int] = (),
) -> EncodedSample:
    """Expand one chat and shift its labels.

    Args:
        key: Sample key.
        ids: Token ids with one placeholder a run, [n] int64.
        supervised: Tokens that are targets, [n] bool.
        items: Media in reading order.
        vision_tokens: Ids of image and video placeholders.
        audio_tokens: Ids of audio placeholders.

    Raises:
        ShapeError: placeholder and run counts differ.
    """
    placeholders = torch.tensor([*vision_tokens, *audio_tokens])
    runs = [run for item in items for run in item.runs]
    expanded, source, positions = expand_runs(ids, torch.isin(ids, placeholders), runs)
    target = torch.where(supervised[source], expanded, IGNORED_LABEL)
    labels = torch.cat([target[1:], target.new_full((1,), IGNORED_LABEL)])
    return EncodedSample(
        key=key,
        input_ids=expanded,
        labels=labels,
        position_ids=positions,
        vision_positions=torch.isin(expanded, torch.tensor(list(vision_tokens))).nonzero().flatten(),
        audio_positions=torch.isin(expanded, torch.tensor(list(audio_tokens), dtype=torch.int64))
        .nonzero()
        .flatten(),
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


def collate(
    samples: Sequence[EncodedSample], *, pad_token: int, seq_length: int | None = None, multiple_of: int = 1
) -> Batch:
    """Right-pad samples into one micro-batch, one row a sample.

    Args:
        samples: At least one.
        pad_token: Id written into padding; padding has position 0 and no label.
        seq_length: Padded length; None pads to the longest sample.
        multiple_of: Round a padded length that follows from the samples up to a multiple of this.

    Raises:
        ShapeError: a sample is longer than `seq_length`.
    """
    longest = max(samples, key=lambda sample: sample.length)
    padded = math.ceil(longest.length / multiple_of) * multiple_of if seq_length is None else seq_length
    if longest.length > padded:
        raise ShapeError(
            "a sample is longer than the batch", where=longest.key, expected=f"at most {padded} tokens",
            got=str(longest.length), fix="raise data.seq_length or set data.over_length",
        )  # fmt: skip
    rows = len(samples)
    input_ids = torch.full((rows, padded), pad_token)
    labels = torch.full((rows, padded), IGNORED_LABEL)
    position_ids = torch.zeros(3, rows, padded, dtype=_position_dtype(samples))
    for row, sample in enumerate(samples):
        input_ids[row, : sample.length] = sample.input_ids
        labels[row, : sample.length] = sample.labels
        position_ids[:, row, : sample.length] = sample.position_ids
    starts = [row * padded for row in range(rows)]
    return _batch(samples, starts, input_ids, labels, position_ids)


def pack(
    samples: Sequence[EncodedSample], *, pad_token: int, seq_length: int | None = None, multiple_of: int = 1,
    sequence_multiple_of: int = 1,
) -> Batch:  # fmt: skip
    """Lay samples end to end in one row that attention keeps apart by `cu_seqlens`.

    Padding at the end is a sub-sequence of its own, so that no sample attends to it.

    Args:
        samples: At least one; positions of each start at 0.
        pad_token: Id written into padding.
        seq_length: Length of the row; None stops after the last sample.
        multiple_of: Round a length that follows from the samples up to a multiple of this.
        sequence_multiple_of: Pad every sample to a multiple of this (context parallelism cuts each in two per rank).

    Raises:
        ShapeError: the samples do not fit.
    """
    padded = [math.ceil(sample.length / sequence_multiple_of) * sequence_multiple_of for sample in samples]
    used = sum(padded)
    row = seq_length if seq_length is not None else math.ceil(used / multiple_of) * multiple_of
    if used > row:
        raise ShapeError("samples do not fit into one pack", expected=f"at most {row} tokens", got=str(used))
    input_ids = torch.full((1, row), pad_token)
    labels = torch.full((1, row), IGNORED_LABEL)
    position_ids = torch.zeros(3, 1, row, dtype=_position_dtype(samples))
    bounds, starts = [0], []
    for sample, room in zip(samples, padded, strict=True):
        start = bounds[-1]
        where = slice(start, start + sample.length)
        input_ids[0, where], labels[0, where] = sample.input_ids, sample.labels
        position_ids[:, 0, where] = sample.position_ids
        starts.append(start)
        bounds.append(start + room)
    if bounds[-1] < row:
        bounds.append(row)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return _batch(samples, starts, input_ids, labels, position_ids, cu_seqlens)


def _position_dtype(samples: Sequence[EncodedSample]) -> torch.dtype:
    whole = all(sample.position_ids.dtype == torch.int64 for sample in samples)
    return torch.int64 if whole else torch.float32


def _batch(
    samples: Sequence[EncodedSample], starts: Sequence[int], input_ids: Tensor, labels: Tensor, position_ids: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Batch:  # fmt: skip
    items = [item for sample in samples for item in sample.items]
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    grids = [item.grid_thw for item in items if item.grid_thw is not None]
    features = [item.input_features for item in items if item.input_features is not None]
    vision = [sample.vision_positions + start for sample, start in zip(samples, starts, strict=True)]
    audio = [sample.audio_positions + start for sample, start in zip(samples, starts, strict=True)]
    kinds = [item.kind for item in items]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        pixel_values=torch.cat(pixels) if pixels else None,
        grid_thw=torch.tensor(grids) if grids else None,
        vision_positions=torch.cat(vision) if pixels else None,
        input_features=torch.cat(features, dim=1) if features else None,
        audio_lengths=torch.tensor([feature.shape[1] for feature in features]) if features else None,
        audio_positions=torch.cat(audio) if features else None,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()) if cu_seqlens is not None else 0,
        sample_keys=tuple(sample.key for sample in samples),
        sample_lengths=tuple(sample.length for sample in samples),
        num_real_tokens=sum(sample.length for sample in samples),
        num_supervised_tokens=int((labels != IGNORED_LABEL).sum()),
        num_images=kinds.count("image"),
        num_videos=kinds.count("video"),
        num_audios=len(features),
    )
