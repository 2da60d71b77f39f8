# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model as plain data; torch-free. Filled from a HF ``config.json`` by each family's ``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_omni"]
FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_omni")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeArchitecture:
    """Mixture-of-experts part of a decoder (softmax router, renormalised top-k)."""

    num_experts: int
    topk: int
    ffn_hidden_size: int
    """Hidden size of one expert."""
    aux_loss_coeff: float
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    """Zero-based decoder layers that keep a dense MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextArchitecture:
    """The decoder."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Head dimension."""
    vocab_size: int
    rotary_base: float
    mrope_section: tuple[int, int, int]
    """Rotary frequencies that turn with time, height, width; sums to kv_channels / 2."""
    mrope_interleaved: bool
    """False: three contiguous sections (Qwen2.5-VL). True: interleaved THWTHW… (Qwen3)."""
    layernorm_epsilon: float
    add_qkv_bias: bool
    qk_layernorm: bool
    max_position_embeddings: int
    tie_word_embeddings: bool
    moe: MoeArchitecture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionArchitecture:
    """The vision transformer, its merger and its deepstack mergers."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    out_hidden_size: int
    hidden_act: str
    """HF name: silu, gelu_pytorch_tanh, …"""
    gated_linear_unit: bool
    normalization: Literal["RMSNorm", "LayerNorm"]
    layernorm_epsilon: float
    patch_embed_bias: bool
    rotary_base: float = 10000.0
    window_size: int | None = None
    """Pixels; None means every layer attends over the whole frame."""
    fullatt_block_indexes: tuple[int, ...] = ()
    num_position_embeddings: int | None = None
    """Size of the learned, interpolated position table (a perfect square); None means no table."""
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Zero-based vision layers whose output is merged and added to the first decoder layers."""
    tokens_per_second: float | None = None
    """Qwen2.5-VL's temporal clock for video positions."""

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch (c, t, h, w)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioArchitecture:
    """The audio tower of Qwen3-Omni's thinker."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_mel_bins: int
    downsample_hidden_size: int
    output_dim: int
    n_window: int
    n_window_infer: int
    conv_chunksize: int
    max_source_positions: int
    activation: str = "gelu"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids that carry meaning in a sequence; None where the family has no such token."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    audio: int | None = None
    audio_start: int | None = None
    audio_end: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A whole model. Each family's ``ModelConfig.from_hf`` makes one from the HF config."""

    family: Family
    hf_model_type: str
    text: TextArchitecture
    vision: VisionArchitecture
    tokens: SpecialTokens
    audio: AudioArchitecture | None = None
    position_id_per_seconds: float | None = None
    """Qwen3-Omni's position clock."""
    extra: dict[str, object] = field(default_factory=dict)
    """What a family keeps for itself; nothing shared reads it."""
