# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL sizes from its HF ``config.json``. Torch-free."""

from dataclasses import dataclass
from typing import Any, Self

from models.contract.architecture import Architecture, SpecialTokens, VisionArchitecture
from models.contract.hf_config import HfSection, read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Architecture):
    """Architecture of a Qwen2.5-VL model."""

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> Self:
        """Read the parsed ``config.json``.

        The hub's files keep the decoder's fields at the top level; transformers 5 writes a `text_config`.

        Raises:
            ConfigError: a field is missing, has the wrong type, or asks for something this family does not have.
        """
        top = HfSection(hf_config, "config.json")
        text = (
            top.section("text_config") if "text_config" in hf_config else HfSection(hf_config, "config.json")
        )
        vision = top.section("vision_config")
        config = cls(
            family="qwen2_5_vl",
            hf_model_type=top.text("model_type"),
            text=read_text(
                text,
                tied=top.boolean("tie_word_embeddings"),
                add_qkv_bias=True,
                qk_layernorm=False,
                mrope_interleaved=False,
            ),
            vision=_read_vision(vision),
            tokens=SpecialTokens(
                image=top.integer("image_token_id"),
                video=top.integer("video_token_id"),
                vision_start=top.integer("vision_start_token_id"),
                vision_end=top.integer("vision_end_token_id"),
            ),
        )
        if config.vision.out_hidden_size != config.text.hidden_size:
            vision.problems.append(
                f"out_hidden_size {config.vision.out_hidden_size} differs from the decoder's hidden_size "
                f"{config.text.hidden_size}"
            )
        top.check(text, vision)
        return config


def _read_vision(vision: HfSection) -> VisionArchitecture:
    depth, full = vision.integer("depth"), vision.integers("fullatt_block_indexes")
    if any(index not in range(depth) for index in full):
        vision.problems.append(f"fullatt_block_indexes {list(full)} must lie in 0..{depth - 1}")
    return VisionArchitecture(
        num_layers=depth,
        hidden_size=vision.integer("hidden_size"),
        ffn_hidden_size=vision.integer("intermediate_size"),
        num_attention_heads=vision.integer("num_heads"),
        patch_size=vision.integer("patch_size", "spatial_patch_size"),
        temporal_patch_size=vision.integer("temporal_patch_size"),
        spatial_merge_size=vision.integer("spatial_merge_size"),
        in_channels=vision.integer("in_channels", "in_chans"),
        out_hidden_size=vision.integer("out_hidden_size"),
        hidden_act=vision.text("hidden_act"),
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,  # transformers: fixed in Qwen2_5_VLVisionBlock, not in the config
        patch_embed_bias=False,
        window_size=vision.integer("window_size"),
        fullatt_block_indexes=full,
        tokens_per_second=vision.number("tokens_per_second"),
    )
