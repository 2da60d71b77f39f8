# SPDX-License-Identifier: Apache-2.0
"""Our micro-batch in the words of a transformers model's ``forward``."""

import dataclasses
from typing import Any

import torch

from models.common.batch import IGNORED_LABEL, Batch
from models.contract.architecture import Architecture
from models.contract.errors import ShapeError


def hf_inputs(batch: Batch, architecture: Architecture) -> dict[str, Any]:
    """Keyword arguments for a vision-language model of transformers.

    Args:
        batch: Unpacked micro-batch on the model's device.
        architecture: For the placeholder ids and the merge size.

    Raises:
        ShapeError: the batch is packed; transformers would let its samples see each other.
    """
    if batch.cu_seqlens is not None:
        raise ShapeError("a packed micro-batch has no transformers form", fix="set data.packing = false")
    s = batch.input_ids.shape[1]
    lengths = torch.tensor(batch.sample_lengths, device=batch.input_ids.device)
    positions = torch.arange(s, device=batch.input_ids.device)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": (positions[None] < lengths[:, None]).long(),  # [b, s]
        "use_cache": False,
    }
    if batch.pixel_values is not None and batch.grid_thw is not None:
        # Videos go as images, in reading order: positions are given, the tower does not tell them apart, and it then
        # runs once a micro-batch on every rank, which a sharded tower needs.
        is_video = batch.input_ids == architecture.tokens.video
        inputs["input_ids"] = batch.input_ids.masked_fill(is_video, architecture.tokens.image)
        inputs["pixel_values"] = batch.pixel_values
        inputs["image_grid_thw"] = batch.grid_thw.to(batch.input_ids.device)
    return inputs


def with_blank_image(batch: Batch, architecture: Architecture) -> Batch:
    """Add a row that holds one blank picture and no label to a micro-batch without pictures.

    A sharded vision tower gathers its parameters on every rank at once: a rank that sees no picture must run it too.
    """
    if batch.pixel_values is not None or batch.labels is None:
        return batch
    vision, tokens = architecture.vision, architecture.tokens
    _, s = batch.input_ids.shape
    row = batch.input_ids.new_zeros(1, s)
    row[0, :3] = torch.tensor([tokens.vision_start, tokens.image, tokens.vision_end])
    merge = vision.spatial_merge_size
    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, row]),
        labels=torch.cat([batch.labels, torch.full_like(row, IGNORED_LABEL)]),
        position_ids=torch.cat([batch.position_ids, batch.position_ids.new_zeros(3, 1, s)], dim=1),
        pixel_values=torch.zeros(merge**2, vision.patch_dim, device=row.device),
        grid_thw=torch.tensor([[1, merge, merge]]),
        vision_positions=torch.tensor([batch.input_ids.numel() + 1], device=row.device),
        sample_lengths=(*batch.sample_lengths, 3),
    )
