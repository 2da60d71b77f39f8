# SPDX-License-Identifier: Apache-2.0
"""Rotary angles: layouts written out by hand, and a closed form."""

import torch

from models.common.rope import MultimodalRope, mrope_axes, vision_rope


def test_mrope_axes_sectioned_are_contiguous() -> None:
    assert mrope_axes((2, 3, 1), interleaved=False).tolist() == [0, 0, 1, 1, 1, 2]


def test_mrope_axes_interleaved_end_in_time() -> None:
    # T H W T H W T H W T, the published 24/20/20 in small: height and width end before time does
    assert mrope_axes((4, 3, 3), interleaved=True).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_mrope_axes_of_the_published_sections_match_the_documented_places() -> None:
    axes = mrope_axes((24, 20, 20), interleaved=True)
    assert (axes == 1).nonzero().flatten().tolist() == list(range(1, 59, 3))
    assert (axes == 2).nonzero().flatten().tolist() == list(range(2, 60, 3))


def test_multimodal_rope_turns_each_frequency_by_its_axis() -> None:
    rope = MultimodalRope(8, 100.0, (2, 1, 1), interleaved=False)
    positions = torch.tensor([[[3]], [[5]], [[7]]])
    frequencies = [1.0, 100.0**-0.25, 100.0**-0.5, 100.0**-0.75]
    expected = [3 * frequencies[0], 3 * frequencies[1], 5 * frequencies[2], 7 * frequencies[3]] * 2
    angles = rope(positions)
    assert angles.shape == (1, 1, 1, 8)
    torch.testing.assert_close(angles.flatten(), torch.tensor(expected))


def test_multimodal_rope_takes_positions_between_whole_numbers() -> None:
    rope = MultimodalRope(4, 10.0, (1, 1, 0), interleaved=False)
    assert rope(torch.full((3, 1, 1), 2.5))[0, 0, 0, 0] == 2.5


def test_multimodal_rope_stays_fp32_when_the_model_is_cast() -> None:
    rope = MultimodalRope(4, 10.0, (1, 1, 0), interleaved=False).to(torch.bfloat16)
    assert rope(torch.full((3, 1, 1), 1000)).dtype == torch.float32


def test_vision_rope_puts_rows_before_columns() -> None:
    angles = vision_rope(torch.tensor([[2, 9]]), head_dim=8, rotary_base=16.0)
    assert angles.flatten().tolist() == [2.0, 0.5, 9.0, 2.25] * 2
