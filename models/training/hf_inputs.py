# SPDX-License-Identifier: Apache-2.0
"""Our micro-batch in the words of a transformers model's ``forward``."""

from typing import Any

import torch
from torch import Tensor

from models.common.batch import Batch
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
    b, s = batch.input_ids.shape
    lengths = torch.tensor(batch.sample_lengths, device=batch.input_ids.device)
    positions = torch.arange(s, device=batch.input_ids.device)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": (positions[None] < lengths[:, None]).long(),  # [b, s]
        "use_cache": False,
    }
    if batch.pixel_values is not None and batch.grid_thw is not None:
        is_video = video_items(batch, architecture)
        patches = batch.grid_thw.prod(dim=1)  # [i]
        of_patch = is_video.repeat_interleave(patches).to(batch.pixel_values.device)  # [p]
        for kind, wanted in (("image", ~is_video), ("video", is_video)):
            if wanted.any():
                name = "pixel_values" if kind == "image" else "pixel_values_videos"
                inputs[name] = batch.pixel_values[of_patch if kind == "video" else ~of_patch]
                inputs[f"{kind}_grid_thw"] = batch.grid_thw[wanted].to(batch.input_ids.device)
    return inputs


def video_items(batch: Batch, architecture: Architecture) -> Tensor:
    """Which visual items of the batch are videos, [i] bool on the CPU: told by their first placeholder."""
    assert batch.grid_thw is not None
    assert batch.vision_positions is not None
    merged = batch.grid_thw.prod(dim=1) // architecture.vision.spatial_merge_size**2  # [i]
    first = (merged.cumsum(0) - merged).to(batch.vision_positions.device)
    ids = batch.input_ids.reshape(-1)[batch.vision_positions[first]]
    return (ids == architecture.tokens.video).cpu()
