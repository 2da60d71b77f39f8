# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of one training step, by two named formulas. Torch-free.

    megatron_lm_padded   Megatron-LM's: decoder only, every padded position, frozen parts counted as trained.
                         The formula behind published "TFLOP/s/GPU" figures.
    model_real           What the model needs for the real tokens: sum of squared sub-sequence lengths in the
                         decoder, vision tower with its windows, gated or plain MLP and mergers, audio tower;
                         frozen parts cost only the passes they take part in. Recompute is never counted.

A multiply-add is two operations; causal attention counts half the square; norms, rotary embeddings, activations and
the router are left out in both, and so is the saving at the very first trained layer, whose input needs no gradient.
"""

from collections.abc import Collection, Iterable

from models.contract.architecture import (
    Architecture,
    AudioArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from models.contract.errors import ConfigError

MEGATRON_FORMULA_ID = "megatron_lm_padded"
MODEL_FORMULA_ID = "model_real"
PARTS = ("language", "vision", "projector", "audio")
"""Names of the parts that a recipe may freeze."""

_CONV_STRIDE = 2
_NUM_CONVS = 3
_CONV_KERNEL = 9


def megatron_flops(text: TextArchitecture, *, num_sequences: int, seq_length: int) -> float:
    """FLOPs of one step by Megatron-LM's formula (`megatron_lm_padded`), forward and backward.

    Args:
        text: The decoder; `vocab_size` is the padded one that is trained.
        num_sequences: Rows of the global batch.
        seq_length: Padded length of a row.
    """
    per_position = 3 * (_text_linear_flops(text) + _causal_core_flops(text, seq_length) / seq_length)
    return float(num_sequences * seq_length * per_position)


def model_flops(
    architecture: Architecture,
    *,
    sample_lengths: Iterable[int],
    grid_thw: Iterable[tuple[int, int, int]] = (),
    audio_frames: Iterable[int] = (),
    trainable: Collection[str] = PARTS,
) -> float:
    """FLOPs of one step over what is real (`model_real`), forward and backward.

    Args:
        architecture: Sizes of the whole model.
        sample_lengths: Real length of every sub-sequence, vision and audio tokens included.
        grid_thw: Patch grid (t, h, w) of every image and video.
        audio_frames: Mel frames of every audio.
        trainable: Parts of :data:`PARTS` that are trained. `projector` is the merger and the deepstack mergers.

    Raises:
        ConfigError: an unknown part, or audio for a model without an audio tower.
    """
    if unknown := set(trainable) - set(PARTS):
        raise ConfigError(
            f"unknown part(s): {', '.join(sorted(unknown))}", expected=f"some of {', '.join(PARTS)}"
        )
    lengths, frames = list(sample_lengths), list(audio_frames)
    if frames and architecture.audio is None:
        raise ConfigError(f"{architecture.family} has no audio tower", got=f"{len(frames)} audios")
    below = bool(set(trainable) & {"vision", "projector", "audio"})
    text = architecture.text
    forward = sum(length * _text_linear_flops(text) + _causal_core_flops(text, length) for length in lengths)
    total = forward * _passes("language" in trainable, "language" in trainable or below)
    for grid in grid_thw:
        total += _vision_step_flops(architecture.vision, grid, trainable)
    if architecture.audio is not None:
        passes = _passes("audio" in trainable, "audio" in trainable)
        total += passes * sum(audio_forward_flops(architecture.audio, count) for count in frames)
    return float(total)


def vision_forward_flops(vision: VisionArchitecture, grid: tuple[int, int, int]) -> dict[str, float]:
    """Forward FLOPs of one image or video by part: patch_embed, tower, mergers."""
    patches = grid[0] * grid[1] * grid[2]
    hidden = vision.hidden_size
    matrices = 3 if vision.gated_linear_unit else 2
    per_layer = 2 * patches * hidden * (4 * hidden + matrices * vision.ffn_hidden_size)
    num_full, num_window = _attention_layers(vision)
    squares = num_full * _frame_squares(grid) + num_window * window_squares(vision, grid)
    merged_width = hidden * vision.spatial_merge_size**2
    merged = patches / vision.spatial_merge_size**2
    one_merger = 2 * merged * merged_width * (merged_width + vision.out_hidden_size)
    return {
        "patch_embed": float(2 * patches * vision.patch_dim * hidden),
        "tower": float(vision.num_layers * per_layer + 4 * hidden * squares),
        "mergers": float((1 + len(vision.deepstack_visual_indexes)) * one_merger),
    }


def window_squares(vision: VisionArchitecture, grid: tuple[int, int, int]) -> int:
    """Sum of squared window lengths, in patches, over all frames of one item.

    Windows are `window_size` pixels wide, cut from the top left; those at the right and lower edge are smaller.
    """
    if vision.window_size is None:
        return _frame_squares(grid)
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size
    rows = _pieces(grid[1] // vision.spatial_merge_size, side)
    columns = _pieces(grid[2] // vision.spatial_merge_size, side)
    cells = sum(row * row for row in rows) * sum(column * column for column in columns)
    return grid[0] * cells * vision.spatial_merge_size**4


def audio_forward_flops(audio: AudioArchitecture, num_frames: int) -> float:
    """Forward FLOPs of one audio of `num_frames` mel frames.

    The convolutions run on chunks of ``2 * n_window`` frames; attention sees ``n_window_infer`` frames at a time.
    """
    chunks = _pieces(num_frames, 2 * audio.n_window)
    channels, convolutions, num_tokens = audio.downsample_hidden_size, 0, 0
    width = audio.num_mel_bins
    for chunk in chunks:
        length, width, inputs = chunk, audio.num_mel_bins, 1
        for _ in range(_NUM_CONVS):
            length, width = _halved(length), _halved(width)
            convolutions += 2 * length * width * channels * inputs * _CONV_KERNEL
            inputs = channels
        num_tokens += length
    tokens_per_chunk = 2 * audio.n_window
    for _ in range(_NUM_CONVS):
        tokens_per_chunk = _halved(tokens_per_chunk)
    window = tokens_per_chunk * (audio.n_window_infer // (2 * audio.n_window))
    squares = sum(piece * piece for piece in _pieces(num_tokens, window))
    hidden = audio.hidden_size
    layer = 2 * num_tokens * hidden * (4 * hidden + 2 * audio.ffn_hidden_size) + 4 * hidden * squares
    ends = 2 * num_tokens * hidden * (channels * width + hidden + audio.output_dim)
    return float(convolutions + audio.num_layers * layer + ends)


def tflops_per_gpu(flops: float, *, step_time_ms: float, world_size: int) -> float:
    """TFLOP/s a device reached in one step."""
    return flops / (step_time_ms / 1000.0) / world_size / 1e12


def tokens_per_second_per_gpu(num_tokens: float, *, step_time_ms: float, world_size: int) -> float:
    """Rate of whichever tokens were counted (padded, real or supervised) on one device."""
    return num_tokens / (step_time_ms / 1000.0) / world_size


def _text_linear_flops(text: TextArchitecture) -> float:
    """Forward FLOPs of the decoder's matrices and logits for one position."""
    queries = text.num_attention_heads * text.kv_channels
    keys = text.num_query_groups * text.kv_channels
    attention = text.num_layers * 2 * text.hidden_size * (2 * queries + 2 * keys)
    num_moe, expert_width = 0, 0
    if text.moe is not None:
        num_moe = text.num_layers - sum(1 for layer in text.moe.dense_layers if layer < text.num_layers)
        expert_width = text.moe.ffn_hidden_size * text.moe.topk
    widths = (text.num_layers - num_moe) * text.ffn_hidden_size + num_moe * expert_width
    return attention + 2 * text.hidden_size * 3 * widths + 2 * text.hidden_size * text.vocab_size


def _causal_core_flops(text: TextArchitecture, length: int) -> float:
    """Forward FLOPs of the two attention products over one sub-sequence, half the square."""
    return 2 * text.num_layers * text.num_attention_heads * text.kv_channels * length * length


def _vision_step_flops(
    vision: VisionArchitecture, grid: tuple[int, int, int], trainable: Collection[str]
) -> float:
    forward = vision_forward_flops(vision, grid)
    tower, projector = "vision" in trainable, "projector" in trainable
    return (
        forward["patch_embed"] * _passes(tower, False)
        + forward["tower"] * _passes(tower, tower)
        + forward["mergers"] * _passes(projector, tower)
    )


def _passes(has_weight_gradient: bool, has_input_gradient: bool) -> int:
    """Forward, plus one pass of the same size for each gradient that is needed."""
    return 1 + has_weight_gradient + has_input_gradient


def _attention_layers(vision: VisionArchitecture) -> tuple[int, int]:
    """Layers that attend over a whole frame, and over windows."""
    if vision.window_size is None:
        return vision.num_layers, 0
    num_full = sum(1 for layer in vision.fullatt_block_indexes if layer < vision.num_layers)
    return num_full, vision.num_layers - num_full


def _frame_squares(grid: tuple[int, int, int]) -> int:
    return grid[0] * (grid[1] * grid[2]) ** 2


def _pieces(length: int, size: int) -> list[int]:
    """Lengths after cutting `length` into pieces of `size`; the last may be shorter."""
    whole, rest = divmod(length, size)
    return [size] * whole + ([rest] if rest else [])


def _halved(length: int) -> int:
    return (length - 1) // _CONV_STRIDE + 1
