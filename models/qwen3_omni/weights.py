# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: which Hugging Face tensors make up which Megatron tensor. Torch-free.

The audio tower keeps its names: it is replicated on every rank, not cut. Talker and code2wav are not trained; export
copies them from the source.
"""

from collections.abc import Mapping

from models.common.weight_rules import ExpertLayout, Shape, WeightRule, copy
from models.common.weight_tables import (
    NameLayout,
    decoder_rules,
    detect_experts,
    detect_prefix,
    interpolated_vision_rules,
    linear_rules,
    norm_rules,
)
from models.contract.architecture import AudioArchitecture
from models.qwen3_omni.config import ModelConfig

HUB = NameLayout(
    text="thinker.model.", vision="thinker.visual.", lm_head="thinker.lm_head.weight", experts="per_expert"
)
AUDIO_PREFIX = "thinker.audio_tower."
UNTOUCHED: tuple[str, ...] = ("talker.", "code2wav.")
"""Prefixes of tensors that no table maps and export copies from the source."""


def detect_layout(
    names: Mapping[str, Shape], config: ModelConfig, *, experts: ExpertLayout | None = None
) -> NameLayout:
    """Names are the same everywhere; experts are separate tensors on the hub, fused in some derived files.

    Raises:
        WeightMappingError: decoder or tower are not where this family has them, or the experts' layout cannot be told.
    """
    text = detect_prefix(names, (HUB.text,), "embed_tokens.weight", what="decoder")
    vision = detect_prefix(names, (HUB.vision,), "patch_embed.proj.weight", what="vision tower")
    stored = detect_experts(names, config.text, text, told=experts)
    return NameLayout(text=text, vision=vision, lm_head=HUB.lm_head, experts=stored)


def weight_table(config: ModelConfig, layout: NameLayout = HUB) -> tuple[WeightRule, ...]:
    """Every Megatron tensor of the thinker and what it is made of."""
    assert config.audio is not None
    vision = interpolated_vision_rules(
        config.vision, layout.vision, norm="ln_q", fc1="mlp.0", fc2="mlp.2", deepstack="merger_list"
    )
    return decoder_rules(config.text, layout) + vision + _audio_rules(config.audio)


def _audio_rules(audio: AudioArchitecture) -> tuple[WeightRule, ...]:
    """The audio tower: three strided convolutions, a transformer with biases everywhere, two projections."""
    width, ffn, channels = audio.hidden_size, audio.ffn_hidden_size, audio.downsample_hidden_size
    rules: list[WeightRule] = []
    for index in (1, 2, 3):
        key, name = f"audio_model.conv2d{index}", f"{AUDIO_PREFIX}conv2d{index}"
        shape = (channels, 1 if index == 1 else channels, 3, 3)
        rules += [
            copy(f"{key}.weight", f"{name}.weight", shape),
            copy(f"{key}.bias", f"{name}.bias", (channels,)),
        ]
    mel = audio.num_mel_bins
    for _ in range(3):  # each convolution halves the mel axis, rounding up
        mel = (mel + 1) // 2
    rules.append(
        copy("audio_model.conv_out.weight", f"{AUDIO_PREFIX}conv_out.weight", (width, channels * mel))
    )
    for layer in range(audio.num_layers):
        key, name = f"audio_model.layers.{layer}", f"{AUDIO_PREFIX}layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rules += linear_rules(f"{key}.self_attn.{part}", f"{name}.self_attn.{part}", (width, width))
        rules += linear_rules(f"{key}.fc1", f"{name}.fc1", (ffn, width))
        rules += linear_rules(f"{key}.fc2", f"{name}.fc2", (width, ffn))
        for part in ("self_attn_layer_norm", "final_layer_norm"):
            rules += norm_rules(f"{key}.{part}.", f"{name}.{part}.", width, bias=True)
    rules += norm_rules("audio_model.ln_post.", f"{AUDIO_PREFIX}ln_post.", width, bias=True)
    rules += linear_rules("audio_model.proj1", f"{AUDIO_PREFIX}proj1", (width, width))
    rules += linear_rules("audio_model.proj2", f"{AUDIO_PREFIX}proj2", (audio.output_dim, width))
    return tuple(rules)
