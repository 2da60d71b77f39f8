# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from models.common.audio import audio_layout
from models.contract.architecture import AudioArchitecture
from models.contract.errors import ShapeError

AUDIO = AudioArchitecture(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_mel_bins=8, downsample_hidden_size=4,
    output_dim=8, n_window=50, n_window_infer=800, conv_chunksize=500, max_source_positions=1500,
)  # fmt: skip


def test_clip_of_237_frames_has_31_tokens_in_one_window() -> None:
    # two chunks of 13 tokens, 37 frames -> 19 -> 10 -> 5 tokens
    layout = audio_layout(np.array([237]), AUDIO)
    assert layout.frame_index.shape == (3, 100)
    assert layout.is_frame.sum() == 237
    assert len(layout.token_rows) == 31
    assert layout.window_lengths.tolist() == [31]


def test_long_clip_is_cut_into_windows_of_eight_chunks() -> None:
    layout = audio_layout(np.array([100 * 17, 40]), AUDIO)
    assert layout.window_lengths.tolist() == [104, 104, 13, 5]


def test_empty_clip_is_named() -> None:
    with pytest.raises(ShapeError, match="clip 1"):
        audio_layout(np.array([100, 0]), AUDIO)
