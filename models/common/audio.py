# SPDX-License-Identifier: Apache-2.0
"""The audio tower of Qwen3-Omni's thinker: mel frames to decoder tokens.

Small beside the decoder, and the same on every rank: nothing of it is split. Parameter names are transformers'.

    mel frames ─ chunks of 2 * n_window ─▶ three convolutions of stride two ─▶ + sinusoids ─▶ transformer, attention
    within windows of n_window_infer frames ─▶ projections
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from models.common.attention import Segments, make_segments, packed_attention
from models.common.transfer import to_device
from models.common.transformer_configs import activation
from models.contract.architecture import AudioArchitecture
from models.contract.errors import ShapeError

Ints = npt.NDArray[np.int64]
TOKENS_PER_CHUNK = 13
"""Of a whole chunk in the checkpoint's geometry of 100 frames; transformers counts whole chunks with it."""


@dataclass(frozen=True, slots=True)
class AudioLayout:
    """Where the frames of a micro-batch go."""

    frame_index: Ints
    """Frame of every place of every chunk, [chunks, longest]; an arbitrary one where the chunk is shorter."""
    is_frame: npt.NDArray[np.bool_]
    """Whether the place holds a frame, [chunks, longest]."""
    token_rows: Ints
    """Rows of the flattened [chunks * tokens] grid that are tokens, in reading order."""
    window_lengths: Ints
    """Tokens that attend to each other."""


def tokens_after_convolutions(frames: Ints) -> Ints:
    """Length after three convolutions of kernel 3, stride 2, padding 1."""
    for _ in range(3):
        frames = (frames - 1) // 2 + 1
    return frames


def audio_layout(lengths: Ints, audio: AudioArchitecture) -> AudioLayout:
    """Lay out the frames of all clips.

    Chunks are as wide as the widest of the micro-batch and windows follow from that, as in transformers: a
    convolution sees the bias of padded places, so another width would give slightly other numbers.

    Args:
        lengths: Mel frames of every clip, [i].
        audio: The tower's sizes.

    Raises:
        ShapeError: a clip has no frames.
    """
    if (lengths < 1).any():
        raise ShapeError(
            "an audio clip has no frames", where=f"clip {int(np.argmin(lengths))} of the micro-batch",
            expected="at least one mel frame", got=str(int(lengths.min())), fix="drop the sample or its clip",
        )  # fmt: skip
    chunk = 2 * audio.n_window
    counts = -(-lengths // chunk)
    sizes = np.full(counts.sum(), chunk)
    lasts = counts.cumsum() - 1
    sizes[lasts] = lengths - (counts - 1) * chunk
    longest = sizes.max()
    starts = sizes.cumsum() - sizes
    place = np.arange(longest)
    is_frame = place < sizes[:, None]
    tokens = tokens_after_convolutions(sizes)
    most = tokens.max()
    token_rows = np.flatnonzero(np.arange(most) < tokens[:, None])
    window = int(most) * (audio.n_window_infer // chunk)
    per_clip = tokens_after_convolutions(lengths % chunk) + lengths // chunk * TOKENS_PER_CHUNK
    windows = [np.diff(np.append(np.arange(0, total, window), total)) for total in per_clip]
    return AudioLayout(
        frame_index=np.where(is_frame, starts[:, None] + place, 0),
        is_frame=is_frame,
        token_rows=token_rows,
        window_lengths=np.concatenate(windows).astype(np.int64),
    )


def sinusoids(length: int, channels: int, *, max_timescale: float = 10000.0) -> Tensor:
    """Sine and cosine positions, [length, channels] float32, on the CPU."""
    half = channels // 2
    scale = torch.exp(
        -math.log(max_timescale) / (half - 1) * torch.arange(half, dtype=torch.float32, device="cpu")
    )
    time = torch.arange(length, device="cpu")[:, None] * scale
    return torch.cat([torch.sin(time), torch.cos(time)], dim=1)


class AudioAttention(nn.Module):
    """Self-attention of the audio tower, within windows."""

    def __init__(self, audio: AudioArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = audio.num_attention_heads
        width = audio.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width, dtype=dtype) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """[t, h] -> [t, h]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)) for projection in projections
        )  # [t, n, d]
        return self.out_proj(packed_attention(query, key, value, segments, is_causal=False).flatten(1))


class AudioLayer(nn.Module):
    """One layer: attention and MLP, each behind its norm."""

    def __init__(self, audio: AudioArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = AudioAttention(audio, dtype)
        self.self_attn_layer_norm = nn.LayerNorm(audio.hidden_size, dtype=dtype)
        self.fc1 = nn.Linear(audio.hidden_size, audio.ffn_hidden_size, dtype=dtype)
        self.fc2 = nn.Linear(audio.ffn_hidden_size, audio.hidden_size, dtype=dtype)
        self.final_layer_norm = nn.LayerNorm(audio.hidden_size, dtype=dtype)
        self.activation = activation(audio.activation, where="audio_config: activation_function")

    def forward(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """[t, h] -> [t, h]."""
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), segments)
        inner = self.activation(self.fc1(self.final_layer_norm(hidden_states)))
        hidden_states = hidden_states + self.fc2(inner)
        if hidden_states.dtype == torch.float16:  # transformers keeps fp16 from overflowing here
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states


class AudioTower(MegatronModule):
    """Mel frames of all clips to tokens.

    Args:
        audio: Sizes.
        config: The decoder's config: dtype and initialisation.
    """

    def __init__(self, audio: AudioArchitecture, config: TransformerConfig) -> None:
        super().__init__(config=config)
        dtype, width = config.params_dtype, audio.downsample_hidden_size
        self.audio = audio
        self.conv2d1, self.conv2d2, self.conv2d3 = (
            nn.Conv2d(inputs, width, 3, stride=2, padding=1, dtype=dtype) for inputs in (1, width, width)
        )
        bins = int(tokens_after_convolutions(np.array(audio.num_mel_bins)))
        self.conv_out = nn.Linear(width * bins, audio.hidden_size, bias=False, dtype=dtype)
        self.layers = nn.ModuleList(AudioLayer(audio, dtype) for _ in range(audio.num_layers))
        self.ln_post = nn.LayerNorm(audio.hidden_size, dtype=dtype)
        self.proj1 = nn.Linear(audio.hidden_size, audio.hidden_size, dtype=dtype)
        self.proj2 = nn.Linear(audio.hidden_size, audio.output_dim, dtype=dtype)
        self.activation = activation(audio.activation, where="audio_config: activation_function")
        self.positions = sinusoids(audio.max_source_positions, audio.hidden_size)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=config.init_method_std)

    def forward(self, input_features: Tensor, audio_lengths: Tensor) -> Tensor:
        """Encode all clips of a micro-batch.

        Args:
            input_features: Log-mel frames, clip after clip, [mel, frames] float32.
            audio_lengths: Frames of every clip, [i] int64, on the CPU.

        Returns: Tokens in reading order, [m, h].

        Raises:
            ShapeError: features of another shape, or a clip without frames.
        """
        self._check(input_features, audio_lengths)
        layout = audio_layout(audio_lengths.numpy(), self.audio)
        device = input_features.device
        index, is_frame, rows = (
            to_device(part, device) for part in (layout.frame_index, layout.is_frame, layout.token_rows)
        )
        chunks = input_features[:, index].movedim(0, 1) * is_frame[:, None]  # [chunks, mel, longest]
        embedded = self._convolve(chunks[:, None].to(self.conv_out.weight.dtype))  # [chunks, tokens, h]
        self.positions = self.positions.to(device)
        embedded = embedded + self.positions[: embedded.shape[1]].to(embedded.dtype)
        hidden_states = embedded.flatten(0, 1)[rows]
        segments = make_segments(layout.window_lengths, device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, segments)
        return self.proj2(self.activation(self.proj1(self.ln_post(hidden_states))))

    def _check(self, input_features: Tensor, audio_lengths: Tensor) -> None:
        expected = (self.audio.num_mel_bins, int(audio_lengths.sum()))
        if tuple(input_features.shape) != expected:
            raise ShapeError(
                "mel features of another shape", where="input_features of the micro-batch",
                expected=f"[mel, frames] = {list(expected)}, clips one after the other",
                got=str(list(input_features.shape)), fix="use the checkpoint's own feature extractor",
            )  # fmt: skip

    def _convolve(self, chunks: Tensor) -> Tensor:
        parts = []
        for part in chunks.split(
            self.audio.conv_chunksize
        ):  # bounds memory: activations are 480 channels wide
            for convolution in (self.conv2d1, self.conv2d2, self.conv2d3):
                part = F.gelu(convolution(part))
            parts.append(part)
        joined = torch.cat(parts)  # [chunks, width, bins, tokens]
        return self.conv_out(joined.permute(0, 3, 1, 2).flatten(2))
