# SPDX-License-Identifier: Apache-2.0
"""Our micro-batch in the words of a transformers model's ``forward``."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from models.common.batch import IGNORED_LABEL, Batch
from models.contract.architecture import Architecture

BLANK_FRAMES = 8
"""Mel frames of a blank clip: three convolutions of stride two make one token of them."""


def hf_inputs(batch: Batch, architecture: Architecture) -> dict[str, Any]:
    """Keyword arguments for a multimodal model of transformers.

    No attention mask is given: rows are padded on the right and attention is causal, so real tokens never see padding.
    A packed row tells its samples apart by text positions that start again, the fourth row of `position_ids`.

    Args:
        batch: Micro-batch on the model's device.
        architecture: For the placeholder ids.
    """
    position_ids = batch.position_ids
    if batch.cu_seqlens is not None:
        position_ids = torch.cat([_text_positions(batch), position_ids])  # [4, 1, s]
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids, "position_ids": position_ids, "use_cache": False,
    }  # fmt: skip
    if batch.pixel_values is not None and batch.grid_thw is not None:
        # Videos go as images, in reading order: positions are given, the tower does not tell them apart, and it then
        # runs once a micro-batch on every rank, which a sharded tower needs.
        is_video = batch.input_ids == architecture.tokens.video
        inputs["input_ids"] = batch.input_ids.masked_fill(is_video, architecture.tokens.image)
        inputs["pixel_values"] = batch.pixel_values
        inputs["image_grid_thw"] = batch.grid_thw.to(batch.input_ids.device)
    if batch.input_features is not None and batch.audio_lengths is not None:
        inputs |= _padded_clips(batch.input_features, batch.audio_lengths.tolist())
    return inputs


def with_blank_media(batch: Batch, architecture: Architecture) -> Batch:
    """Give a training micro-batch without pictures (or clips, where the model hears) a blank one, without a label.

    A sharded tower gathers its parameters on every rank at once: a rank that sees no picture must run it too. The blank
    is a row of its own after the others, or a sample of its own at the end of a packed row.
    """
    wants_picture = batch.pixel_values is None
    wants_clip = architecture.audio is not None and batch.input_features is None
    if batch.labels is None or not (wants_picture or wants_clip):
        return batch
    tokens: list[int] = []
    changes: dict[str, Any] = {}
    is_packed = batch.cu_seqlens is not None
    device = batch.input_ids.device
    if wants_picture:
        special, vision = architecture.tokens, architecture.vision
        merge = vision.spatial_merge_size
        tokens += [special.vision_start, special.image, special.vision_end]
        changes["pixel_values"] = torch.zeros(merge**2, vision.patch_dim, device=device)
        changes["grid_thw"] = torch.tensor([[1, merge, merge]])
        changes["vision_positions"] = torch.tensor([batch.input_ids.numel() + 1], device=device)
    if wants_clip:
        assert architecture.audio is not None
        special = architecture.tokens
        assert special.audio is not None
        tokens.append(special.audio)
        changes["input_features"] = torch.zeros(architecture.audio.num_mel_bins, BLANK_FRAMES, device=device)
        changes["audio_lengths"] = torch.tensor([BLANK_FRAMES])
        changes["audio_positions"] = torch.tensor([batch.input_ids.numel() + len(tokens) - 1], device=device)
    length = len(tokens) if is_packed else batch.input_ids.shape[1]
    row = batch.input_ids.new_zeros(1, length)
    row[0, : len(tokens)] = torch.tensor(tokens, device=device)
    axis = 1 if is_packed else 0
    if batch.cu_seqlens is not None:
        changes["cu_seqlens"] = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + length])
    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, row], dim=axis),
        labels=torch.cat([batch.labels, torch.full_like(row, IGNORED_LABEL)], dim=axis),
        position_ids=torch.cat(
            [batch.position_ids, batch.position_ids.new_zeros(3, 1, length)], dim=axis + 1
        ),
        sample_lengths=(*batch.sample_lengths, len(tokens)),
        **changes,
    )


def _text_positions(batch: Batch) -> Tensor:
    """Place of every token in its own sample, [1, 1, s]."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff().tolist()
    places = torch.cat([torch.arange(length) for length in lengths])
    return places.to(batch.position_ids)[None, None]


def _padded_clips(features: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Clips [mel, frames] one after the other as transformers takes them: [i, mel, longest] with a mask."""
    padded = features.new_zeros(len(lengths), features.shape[0], max(lengths))
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=features.device)
    for index, clip in enumerate(features.split(lengths, dim=1)):
        padded[index, :, : clip.shape[1]] = clip
        mask[index, : clip.shape[1]] = 1
    return {"input_features": padded, "feature_attention_mask": mask}
