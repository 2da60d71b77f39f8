# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, dense and mixture of experts: which Hugging Face tensors make up which Megatron tensor. Torch-free."""

from collections.abc import Mapping

from models.common.weight_rules import ExpertLayout, Shape, WeightRule
from models.common.weight_tables import (
    NameLayout,
    decoder_rules,
    detect_experts,
    detect_prefix,
    interpolated_vision_rules,
)
from models.qwen3_vl.config import ModelConfig

HUB = NameLayout(
    text="model.language_model.", vision="model.visual.", lm_head="lm_head.weight", experts="fused"
)
UNTOUCHED: tuple[str, ...] = ()
"""Prefixes of tensors that no table maps and export copies from the source."""


def detect_layout(
    names: Mapping[str, Shape], config: ModelConfig, *, experts: ExpertLayout | None = None
) -> NameLayout:
    """Names are the same everywhere; experts are stored in one of three layouts, see `detect_experts`.

    Raises:
        WeightMappingError: the decoder or the vision tower is not where this family has it, or the experts' layout
            cannot be told.
    """
    text = detect_prefix(names, (HUB.text,), "embed_tokens.weight", what="decoder")
    vision = detect_prefix(names, (HUB.vision,), "patch_embed.proj.weight", what="vision tower")
    stored = detect_experts(names, config.text, text, told=experts)
    return NameLayout(text=text, vision=vision, lm_head=HUB.lm_head, experts=stored)


def weight_table(config: ModelConfig, layout: NameLayout = HUB) -> tuple[WeightRule, ...]:
    """Every Megatron tensor of the model and what it is made of."""
    vision = interpolated_vision_rules(
        config.vision,
        layout.vision,
        norm="norm",
        fc1="linear_fc1",
        fc2="linear_fc2",
        deepstack="deepstack_merger_list",
    )
    return decoder_rules(config.text, layout) + vision
