# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models to compare with. Every weight is drawn at random.

transformers starts biases at zero and norms at one, which hides every permutation of them; here they differ too.
Sizes are pairwise different so that a transposed tensor cannot pass.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from models.common.weight_rules import WeightRule
from models.common.weight_tables import NameLayout
from models.contract.architecture import Architecture
from models.contract.families import detect_family, family_part

TOKENS = {
    "image_token_id": 151,
    "video_token_id": 152,
    "vision_start_token_id": 149,
    "vision_end_token_id": 150,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 158,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "depth": 5,
    "hidden_size": 40,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN3_TEXT = TEXT | {
    "head_dim": 20,
    "rope_parameters": MROPE | {"mrope_section": [4, 3, 3], "mrope_interleaved": True},
}
QWEN3_VISION = VISION | {
    "intermediate_size": 56,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2, 3],
}
EXPERTS = {"moe_intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """One tiny model: transformers classes and config."""

    config_class: str
    model_class: str
    config: dict[str, Any]
    layout: NameLayout
    """Names in transformers' memory, not on disk."""
    splits_videos: bool
    """Frames of a video stand apart in the text, each with its own time stamp."""
    section: str | None = None
    """Section of ``config.json`` that the transformers class is made from; names on disk start with its first word."""
    model_type: str | None = None
    """Of the whole file, where `section` is a part of it."""

    @property
    def name_prefix(self) -> str:
        """What names on disk have in front of those in memory."""
        return "" if self.section is None else self.section.removesuffix("_config") + "."


IN_MEMORY = NameLayout(
    text="model.language_model.", vision="model.visual.", lm_head="lm_head.weight", experts="fused_transposed"
)
TINY: dict[str, Tiny] = {
    "qwen2_5_vl": Tiny(
        config_class="Qwen2_5_VLConfig",
        model_class="Qwen2_5_VLForConditionalGeneration",
        config=TOKENS
        | {
            "tie_word_embeddings": False,
            "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_section": [1, 2, 1]}},
            "vision_config": VISION
            | {
                "intermediate_size": 56,
                "window_size": 16,
                "fullatt_block_indexes": [1, 4],
                "tokens_per_second": 2,
            },
        },
        layout=IN_MEMORY,
        splits_videos=False,
    ),
    "qwen3_vl": Tiny(
        config_class="Qwen3VLConfig",
        model_class="Qwen3VLForConditionalGeneration",
        config=TOKENS
        | {"tie_word_embeddings": True, "text_config": QWEN3_TEXT, "vision_config": QWEN3_VISION},
        layout=IN_MEMORY,
        splits_videos=True,
    ),
    "qwen3_vl_moe": Tiny(
        config_class="Qwen3VLMoeConfig",
        model_class="Qwen3VLMoeForConditionalGeneration",
        config=TOKENS
        | {
            "tie_word_embeddings": False,
            "text_config": QWEN3_TEXT | EXPERTS | {"mlp_only_layers": [1]},
            "vision_config": QWEN3_VISION,
        },
        layout=IN_MEMORY,
        splits_videos=True,
    ),
    "qwen3_omni": Tiny(
        config_class="Qwen3OmniMoeThinkerConfig",
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        config=TOKENS
        | {
            "audio_token_id": 153,
            "audio_start_token_id": 154,
            "audio_end_token_id": 155,
            "position_id_per_seconds": 13,
            "tie_word_embeddings": False,
            "text_config": QWEN3_TEXT | EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": []},
            "vision_config": QWEN3_VISION,
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 3,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 44,
                "num_mel_bins": 18,
                "downsample_hidden_size": 10,
                "output_dim": 48,
                "n_window": 50,
                "n_window_infer": 200,
                "conv_chunksize": 2,
                "max_source_positions": 60,
            },
        },
        layout=NameLayout(
            text="thinker.model.",
            vision="thinker.visual.",
            lm_head="thinker.lm_head.weight",
            experts="fused_transposed",
        ),
        splits_videos=False,
        section="thinker_config",
        model_type="qwen3_omni_moe",
    ),
}


def build_oracle(name: str, *, seed: int = 0, num_layers: int | None = None) -> PreTrainedModel:
    """A tiny transformers model in fp32 with every parameter random.

    Args:
        name: A key of :data:`TINY`.
        seed: Of the weights.
        num_layers: Decoder layers, where a layout needs more than the four there are.
    """
    tiny = TINY[name]
    fields = json.loads(json.dumps(tiny.config))
    fields["text_config"]["num_hidden_layers"] = num_layers or TEXT["num_hidden_layers"]
    config = getattr(transformers, tiny.config_class)(**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, tiny.model_class)._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and not parameter_name.endswith("bias")
            parameter.copy_(1 + 0.3 * draw if is_scale else 0.15 * draw)
    return model.eval()


def hf_config_of(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """The parsed ``config.json`` that goes with a transformers model."""
    tiny = TINY[name]
    saved = json.loads(model.config.to_json_string(use_diff=True))
    return saved if tiny.section is None else {"model_type": tiny.model_type, tiny.section: saved}


def architecture_of(name: str, model: PreTrainedModel) -> Architecture:
    """Our architecture of a transformers model."""
    hf_config = hf_config_of(name, model)
    return family_part(detect_family(hf_config), "config").ModelConfig.from_hf(hf_config)


def named_tensors(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that the weight rules use."""
    return {TINY[name].name_prefix + key: value.detach() for key, value in tensors.items()}


def rules_of(name: str, architecture: Architecture) -> tuple[WeightRule, ...]:
    """Weight rules over the names that transformers uses in memory."""
    return family_part(architecture.family, "weights").weight_table(architecture, TINY[name].layout)
