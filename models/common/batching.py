# SPDX-License-Identifier: Apache-2.0
"""From encoded samples to a :class:`Batch`: a row a sample, or all of them packed into one row. For every family."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.common.batch import IGNORED_LABEL, Batch
from models.common.sequences import EncodedSample
from models.contract.errors import ShapeError


def build_batch(
    samples: Sequence[EncodedSample],
    *,
    pad_token: int,
    seq_length: int | None = None,
    packing: bool = False,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
) -> Batch:
    """One micro-batch: a row a sample, or all samples packed into one row.

    Args:
        samples: Encoded samples.
        pad_token: Id of padding.
        seq_length: Padded length; None follows from the samples.
        packing: One row with `cu_seqlens`.
        multiple_of: Rounds a length that follows from the samples.
        sequence_multiple_of: Rounds every sample of a pack (context parallelism).

    Raises:
        ShapeError: the samples do not fit.
    """
    if packing:
        return pack(
            samples, pad_token=pad_token, seq_length=seq_length, multiple_of=multiple_of,
            sequence_multiple_of=sequence_multiple_of,
        )  # fmt: skip
    return collate(samples, pad_token=pad_token, seq_length=seq_length, multiple_of=multiple_of)


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


def _check_media(sample: EncodedSample) -> None:
    """Every placeholder has its medium, and every medium its placeholders; here the sample still has a name."""
    placeholders = sample.vision_positions.numel() + sample.audio_positions.numel()
    tokens = sum(run.ids.numel() for item in sample.items for run in item.runs)
    if placeholders != tokens:
        raise ShapeError(
            "placeholders and media differ", where=f"sample {sample.key}", expected=f"{tokens} placeholder token(s)",
            got=str(placeholders), fix="give every placeholder its medium, or drop the sample",
        )  # fmt: skip
    for item in sample.items:
        if item.grid_thw is None or item.pixel_values is None:
            continue
        if math.prod(item.grid_thw) != item.pixel_values.shape[0]:
            raise ShapeError(
                f"the patches of a {item.kind} do not fill its grid", where=f"sample {sample.key}",
                expected=f"{math.prod(item.grid_thw)} patches", got=str(item.pixel_values.shape[0]),
                fix="process the medium again",
            )  # fmt: skip


def _batch(
    samples: Sequence[EncodedSample], starts: Sequence[int], input_ids: Tensor, labels: Tensor, position_ids: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Batch:  # fmt: skip
    for sample in samples:
        _check_media(sample)
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
