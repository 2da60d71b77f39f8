# SPDX-License-Identifier: Apache-2.0
"""What a model takes for one micro-batch. Plain tensors and counts; made by a family's ``data.py``."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from models.common.transfer import to_device

IGNORED_LABEL = -100
"""Label of a position that has no loss."""

CPU_FIELDS = ("grid_thw", "audio_lengths", "cu_seqlens")
"""Fields that stay on the CPU: layouts are computed from them, and reading them must not wait for a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of one data-parallel rank, right-padded.

    Visual items (images and videos together) come in reading order: sample by sample, left to right. So do audio
    items. A packed micro-batch is one row (b == 1) of n samples, told apart by `cu_seqlens`.
    """

    input_ids: Tensor
    """[b, s] int64."""
    position_ids: Tensor
    """[3, b, s] int64: time, height, width."""
    labels: Tensor | None = None
    """[b, s] int64, already shifted: labels[i] is the target at position i; -100 is ignored. None asks for logits."""

    pixel_values: Tensor | None = None
    """[p, c] float32: flattened patches of all visual items."""
    grid_thw: Tensor | None = None
    """[i, 3] int64, on the CPU: patches in time, height, width of each visual item."""
    vision_positions: Tensor | None = None
    """[m] int64: index into the flattened b*s of each visual placeholder."""

    input_features: Tensor | None = None
    """[mel, frames] float32: log-mel frames of all audio items, one after the other, no padding between them."""
    audio_lengths: Tensor | None = None
    """[i] int64, on the CPU: frames of each audio item."""
    audio_positions: Tensor | None = None
    """[m] int64: index into the flattened b*s of each audio placeholder."""

    cu_seqlens: Tensor | None = None
    """[n+1] int32, on the CPU: bounds of the samples of a packed row, the last one equal to s. None when not packed."""
    max_seqlen: int = 0
    """Longest sample of a packed row."""

    sample_keys: tuple[str, ...] = ()
    sample_lengths: tuple[int, ...] = ()
    """Real length of every sample."""
    num_real_tokens: int = 0
    num_supervised_tokens: int = 0
    num_images: int = 0
    num_videos: int = 0
    num_audios: int = 0

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, except what belongs on the CPU."""
        return self._changed(lambda tensor: to_device(tensor, torch.device(device)))

    def pin_memory(self) -> Self:
        """Copy to where a GPU reads from without a wait; torch's loaders call this in a thread beside the training."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With other tensors, except what belongs on the CPU."""
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name not in CPU_FIELDS
        }
        return dataclasses.replace(self, **changed)
