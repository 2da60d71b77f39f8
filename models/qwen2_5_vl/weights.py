# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: which Hugging Face tensors make up which Megatron tensor. Torch-free."""

from collections.abc import Mapping

from models.common.weight_rules import ExpertLayout, Shape, WeightRule, concatenate, copy
from models.common.weight_tables import (
    NameLayout,
    decoder_rules,
    detect_prefix,
    linear_rules,
    norm_rules,
    patch_embed_rules,
    vision_attention_rules,
)
from models.contract.architecture import VisionArchitecture
from models.qwen2_5_vl.config import ModelConfig

HUB = NameLayout(text="model.", vision="visual.", lm_head="lm_head.weight")
UNTOUCHED: tuple[str, ...] = ()
"""Prefixes of tensors that no table maps and export copies from the source."""


def detect_layout(
    names: Mapping[str, Shape], config: ModelConfig, *, experts: ExpertLayout | None = None
) -> NameLayout:
    """Which names a checkpoint uses: the hub's, or the in-memory names that some transformers 5 versions wrote.

    Raises:
        WeightMappingError: neither.
    """
    del config, experts  # dense only
    return NameLayout(
        text=detect_prefix(names, ("model.", "model.language_model."), "embed_tokens.weight", what="decoder"),
        vision=detect_prefix(
            names, ("visual.", "model.visual."), "patch_embed.proj.weight", what="vision tower"
        ),
        lm_head="lm_head.weight",
    )


def weight_table(config: ModelConfig, layout: NameLayout = HUB) -> tuple[WeightRule, ...]:
    """Every Megatron tensor of the model and what it is made of."""
    return decoder_rules(config.text, layout) + _vision_rules(config.vision, layout.vision)


def _vision_rules(vision: VisionArchitecture, prefix: str) -> tuple[WeightRule, ...]:
    """The window-attention tower: RMSNorm, gated MLP with biases, one merger."""
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    merged = hidden * vision.spatial_merge_size**2
    rules = patch_embed_rules(vision, prefix)
    for layer in range(vision.num_layers):
        key, name = f"vision_model.layers.{layer}", f"{prefix}blocks.{layer}"
        mlp = f"{name}.mlp"
        rules += vision_attention_rules(vision, key, name)
        rules.append(copy(f"{key}.mlp.linear_fc1.layer_norm_weight", f"{name}.norm2.weight", (hidden,)))
        inner: Shape
        for kind, inner in (("weight", (hidden,)), ("bias", ())):
            halves = ((f"{mlp}.gate_proj.{kind}", ffn), (f"{mlp}.up_proj.{kind}", ffn))
            rules.append(concatenate(f"{key}.mlp.linear_fc1.{kind}", halves, inner))
        rules += linear_rules(f"{key}.mlp.linear_fc2", f"{mlp}.down_proj", (hidden, ffn))
    rules += norm_rules("vision_model.merger.norm.", f"{prefix}merger.ln_q.", hidden, bias=False)
    rules += linear_rules("vision_model.merger.linear_fc1", f"{prefix}merger.mlp.0", (merged, merged))
    rules += linear_rules(
        "vision_model.merger.linear_fc2", f"{prefix}merger.mlp.2", (vision.out_hidden_size, merged)
    )
    return tuple(rules)
