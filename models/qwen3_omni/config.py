# SPDX-License-Identifier: Apache-2.0
"""Sizes of Qwen3-Omni's thinker from the HF ``config.json``. Torch-free.

The talker and code2wav are not modelled; their sections are left alone.
"""

from dataclasses import dataclass
from typing import Any, Self

from models.contract.architecture import Architecture, AudioArchitecture, SpecialTokens
from models.contract.hf_config import HfSection, read_interpolated_vision, read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Architecture):
    """Architecture of a Qwen3-Omni thinker."""

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> Self:
        """Read the parsed ``config.json``.

        Published files have no `tie_word_embeddings` in `thinker_config`, only in its `text_config`; transformers 5
        writes it in `thinker_config`, which then decides.

        Raises:
            ConfigError: a field is missing, has the wrong type, or asks for something this family does not have.
        """
        top = HfSection(hf_config, "config.json")
        thinker = top.section("thinker_config")
        text, vision, audio = (thinker.section(f"{name}_config") for name in ("text", "vision", "audio"))
        tied = thinker if thinker.has("tie_word_embeddings") else text
        config = cls(
            family="qwen3_omni",
            hf_model_type=top.text("model_type"),
            text=read_text(
                text,
                tied=tied.boolean("tie_word_embeddings"),
                add_qkv_bias=False,
                qk_layernorm=True,
                mrope_interleaved=True,
            ),
            vision=read_interpolated_vision(vision),
            audio=_read_audio(audio),
            tokens=SpecialTokens(
                image=thinker.integer("image_token_id"),
                video=thinker.integer("video_token_id"),
                vision_start=thinker.integer("vision_start_token_id"),
                vision_end=thinker.integer("vision_end_token_id"),
                audio=thinker.integer("audio_token_id"),
                audio_start=thinker.integer("audio_start_token_id"),
                audio_end=thinker.integer("audio_end_token_id"),
            ),
            position_id_per_seconds=thinker.number("position_id_per_seconds"),
        )
        text.require("attention_bias", False)
        for part, width in ((vision, config.vision.out_hidden_size), (audio, audio.integer("output_dim"))):
            if width != config.text.hidden_size:
                part.problems.append(
                    f"output width {width} differs from the decoder's {config.text.hidden_size}"
                )
        top.check(thinker, text, vision, audio)
        return config


def _read_audio(audio: HfSection) -> AudioArchitecture:
    audio.require("scale_embedding", False)
    return AudioArchitecture(
        num_layers=audio.integer("encoder_layers"),
        hidden_size=audio.integer("d_model"),
        ffn_hidden_size=audio.integer("encoder_ffn_dim"),
        num_attention_heads=audio.integer("encoder_attention_heads"),
        num_mel_bins=audio.integer("num_mel_bins"),
        downsample_hidden_size=audio.integer("downsample_hidden_size"),
        output_dim=audio.integer("output_dim"),
        n_window=audio.integer("n_window"),
        n_window_infer=audio.integer("n_window_infer"),
        conv_chunksize=audio.integer("conv_chunksize"),
        max_source_positions=audio.integer("max_source_positions"),
        activation=audio.text("activation_function"),
    )
