# SPDX-License-Identifier: Apache-2.0
"""Rotary angles: three-axis ones for the decoder, two-axis ones for the vision tower."""

import torch
from torch import Tensor


def mrope_axes(mrope_section: tuple[int, int, int], *, interleaved: bool) -> Tensor:
    """Which axis (0 time, 1 height, 2 width) turns each rotary frequency.

    Sectioned (Qwen2.5-VL): T…T H…H W…W. Interleaved (Qwen3): THWTHW… until height and width are used up, T after.

    Args:
        mrope_section: Number of frequencies of time, height and width; they sum to d/2.
        interleaved: Which of the two layouts.

    Returns: [d/2] int64, on the CPU.
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section))
    axes = torch.zeros(sum(mrope_section), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * mrope_section[axis] : 3] = axis
    return axes


class MultimodalRope(torch.nn.Module):
    """Absolute angles for every position, with the call signature of megatron-core's mrope.

    megatron-core 0.19 has the sectioned layout alone and slices context-parallel positions by itself; here the
    positions that come in are the local ones already.

    Args:
        kv_channels: Head dimension d.
        rotary_base: Base of the geometric series of frequencies.
        mrope_section: See :func:`mrope_axes`.
        interleaved: See :func:`mrope_axes`.
    """

    def __init__(
        self, kv_channels: int, rotary_base: float, mrope_section: tuple[int, int, int], *, interleaved: bool
    ) -> None:
        super().__init__()
        exponents = torch.arange(0, kv_channels, 2, dtype=torch.float32, device="cpu") / kv_channels
        self.inv_freq = 1.0 / rotary_base**exponents
        with torch.device("cpu"):
            self.axes = mrope_axes(mrope_section, interleaved=interleaved)

    def forward(self, position_ids: Tensor, mrope_section: object = None, cp_group: object = None) -> Tensor:
        """Angles of positions.

        Plain attributes, not buffers: a buffer would be cast to bf16 with the model.

        Args:
            position_ids: [3, b, s] int64.
            mrope_section: Passed by GPTModel; the constructor's is used.
            cp_group: Passed by GPTModel; positions are local already.

        Returns: Angles, [s, b, 1, d] float32, both halves alike.
        """
        if self.inv_freq.device != position_ids.device:
            self.inv_freq, self.axes = (
                self.inv_freq.to(position_ids.device),
                self.axes.to(position_ids.device),
            )
        by_frequency = position_ids.float()[self.axes]  # [d/2, b, s]
        angles = by_frequency.permute(2, 1, 0) * self.inv_freq  # [s, b, d/2]
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]


def vision_rope(rows_and_columns: Tensor, head_dim: int, rotary_base: float) -> Tensor:
    """Angles of patches: the first half of the frequencies turn with the row, the second with the column.

    Args:
        rows_and_columns: [p, 2] int64.
        head_dim: d.
        rotary_base: Base of the geometric series.

    Returns: [p, 1, 1, d] float32, both halves alike.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=rows_and_columns.device) / half
    angles = (rows_and_columns[:, :, None] * (1.0 / rotary_base**exponents)).flatten(1)  # [p, d/2]
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]
