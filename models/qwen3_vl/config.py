# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL sizes, dense and mixture of experts, from the HF ``config.json``. Torch-free."""

from dataclasses import dataclass
from typing import Any, Self

from models.contract.architecture import Architecture, SpecialTokens
from models.contract.hf_config import HfSection, read_interpolated_vision, read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Architecture):
    """Architecture of a Qwen3-VL model."""

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> Self:
        """Read the parsed ``config.json``.

        The top level decides whether embeddings are tied: the MoE text config defaults to true and means nothing.

        Raises:
            ConfigError: a field is missing, has the wrong type, or asks for something this family does not have.
        """
        top = HfSection(hf_config, "config.json")
        text, vision = top.section("text_config"), top.section("vision_config")
        config = cls(
            family="qwen3_vl",
            hf_model_type=top.text("model_type"),
            text=read_text(
                text,
                tied=top.boolean("tie_word_embeddings"),
                add_qkv_bias=False,
                qk_layernorm=True,
                mrope_interleaved=True,
            ),
            vision=read_interpolated_vision(vision),
            tokens=SpecialTokens(
                image=top.integer("image_token_id"),
                video=top.integer("video_token_id"),
                vision_start=top.integer("vision_start_token_id"),
                vision_end=top.integer("vision_end_token_id"),
            ),
        )
        text.require("attention_bias", False)
        if config.vision.out_hidden_size != config.text.hidden_size:
            vision.problems.append(
                f"out_hidden_size {config.vision.out_hidden_size} differs from the decoder's hidden_size "
                f"{config.text.hidden_size}"
            )
        top.check(text, vision)
        return config
