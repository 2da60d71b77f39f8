# SPDX-License-Identifier: Apache-2.0
"""Configs of tiny models in the hub's spelling: every mechanism of the published models, at sizes a CPU trains.

Sizes that meet in one tensor differ, so that a transposed or swapped tensor cannot fit by accident: the hidden size
is neither the experts' size nor twice it, windows and full attention alternate, deepstack levels lie inside the tower.
"""

from typing import Any

from models.contract.architecture import Family
from models.contract.families import detect_family, published_config

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""In the published order; they follow the byte-pair vocabulary."""
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Added tokens that a decoder shows."""
AUDIO_TOKENS = (
    "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
    "<|audio_pad|>",
)  # fmt: skip
NUM_BPE_TOKENS = 544
"""Bytes and merges; added tokens follow."""

_VISION_GPT = {
    "deepstack_visual_indexes": [0, 2],
    "depth": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 152,
    "num_heads": 4,
    "num_position_embeddings": 49,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TEXT_QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 80,
    "initializer_range": 0.02,
    "intermediate_size": 200,
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "rope_type": "default"},
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 616,
}
_MOE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 56,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}


def added_tokens(family: Family) -> tuple[str, ...]:
    """Added tokens of a family, in the order of their ids."""
    if family == "qwen2_5_vl":
        return SPECIAL_TOKENS + PLAIN_ADDED_TOKENS[:8]
    return SPECIAL_TOKENS + PLAIN_ADDED_TOKENS + (AUDIO_TOKENS if family == "qwen3_omni" else ())


def token_ids(family: Family) -> dict[str, int]:
    """Id of every added token."""
    return {token: NUM_BPE_TOKENS + index for index, token in enumerate(added_tokens(family))}


def tiny_config(family: Family, *, moe: bool = False) -> dict[str, Any]:
    """The ``config.json`` of a tiny model.

    Args:
        family: Which family.
        moe: The mixture-of-experts variant of Qwen3-VL; Qwen3-Omni always is one, Qwen2.5-VL never.
    """
    ids = token_ids(family)
    media = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    if family == "qwen2_5_vl":
        return _qwen2_5_vl(media, ends)
    if family == "qwen3_vl":
        return _qwen3_vl(media, ends, moe=moe)
    return _qwen3_omni(media, ends, ids)


def sized_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a published size with the token ids of the tiny tokenizer; its vocabulary stays as large.

    Args:
        name: A published size, as in ``models/contract/published``.
    """
    config = published_config(name)
    family = detect_family(config)
    return _with_token_ids(config, tiny_config(family, moe="moe" in config["model_type"]))


def _with_token_ids(config: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    ids = {key: value for key, value in tiny.items() if key.endswith("_token_id")}
    nested = {
        key: _with_token_ids(value, tiny.get(key, {}))
        for key, value in config.items()
        if isinstance(value, dict)
    }
    return {**config, **nested, **{key: value for key, value in ids.items() if key in config}}


def _qwen2_5_vl(media: dict[str, int], ends: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **media,
        "vision_token_id": media["vision_end_token_id"] + 1,
        **ends,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 232,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 600,
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 96,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def _qwen3_vl(media: dict[str, int], ends: dict[str, int], *, moe: bool) -> dict[str, Any]:
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    name = "Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"
    return {
        "architectures": [name],
        "model_type": kind,
        **media,
        "text_config": {**_TEXT_QWEN3, **ends, **(_MOE if moe else {}), "model_type": f"{kind}_text"},
        "tie_word_embeddings": not moe,
        "vision_config": {**_VISION_GPT, "model_type": kind, "out_hidden_size": _TEXT_QWEN3["hidden_size"]},
    }


def _qwen3_omni(media: dict[str, int], ends: dict[str, int], ids: dict[str, int]) -> dict[str, Any]:
    hidden = _TEXT_QWEN3["hidden_size"]
    text = {**_TEXT_QWEN3, **_MOE, **ends, "model_type": "qwen3_omni_moe_text", "tie_word_embeddings": False}
    text |= {"vocab_size": 632, "rope_theta": 1000000, "intermediate_size": 56}
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "im_start_token_id": ids["<|im_start|>"],
        "im_end_token_id": ids["<|im_end|>"],
        "thinker_config": {
            "model_type": "qwen3_omni_moe_thinker",
            **media,
            "audio_token_id": ids["<|audio_pad|>"],
            "audio_start_token_id": ids["<|audio_start|>"],
            "audio_end_token_id": ids["<|audio_end|>"],
            "position_id_per_seconds": 13,
            "seconds_per_chunk": 2,
            "initializer_range": 0.02,
            "text_config": text,
            "vision_config": {
                **_VISION_GPT,
                "model_type": "qwen3_omni_moe_vision_encoder",
                "out_hidden_size": hidden,
                "image_size": 112,
                "spatial_patch_size": 16,
                "tokens_per_second": 2,
                "apply_vit_abs_pos_embed": True,
            },
            "audio_config": {
                "activation_dropout": 0,
                "activation_function": "gelu",
                "attention_dropout": 0,
                "conv_chunksize": 500,
                "d_model": 48,
                "downsample_hidden_size": 20,
                "dropout": 0,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 120,
                "encoder_layers": 3,
                "initializer_range": 0.02,
                "max_source_positions": 1500,
                "model_type": "qwen3_omni_moe_audio_encoder",
                "n_window": 50,
                "n_window_infer": 400,
                "num_hidden_layers": 3,
                "num_mel_bins": 128,
                "output_dim": hidden,
                "scale_embedding": False,
            },
        },
        "talker_config": _talker(ids),
        "code2wav_config": _CODE2WAV,
    }


_CODE2WAV = {
    "codebook_size": 32, "codebook_dim": 24, "decoder_dim": 48, "hidden_size": 40, "intermediate_size": 72,
    "layer_scale_initial_scale": 0.01, "max_position_embeddings": 512, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 4, "num_quantizers": 4, "num_semantic_quantizers": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 10000, "semantic_codebook_size": 64, "sliding_window": 72,
    "upsample_rates": [2, 2], "upsampling_ratios": [2, 2], "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "model_type": "",
}  # fmt: skip


def _talker(ids: dict[str, int]) -> dict[str, Any]:
    text = {**_TEXT_QWEN3, **_MOE, "model_type": "qwen3_omni_moe_talker_text", "tie_word_embeddings": False}
    text |= {
        "hidden_size": 48, "intermediate_size": 88, "moe_intermediate_size": 28, "num_attention_heads": 4,
        "num_hidden_layers": 2, "shared_expert_intermediate_size": 36, "num_experts": 6, "vocab_size": 72,
        "rope_theta": 1000000, "sliding_window": None,
    }  # fmt: skip
    predictor = {key: value for key, value in _TEXT_QWEN3.items() if key != "rope_scaling"}
    predictor |= {
        "hidden_size": 48, "intermediate_size": 88, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_code_groups": 4, "vocab_size": 32, "rope_theta": 1000000, "max_window_layers": 2,
        "model_type": "qwen3_omni_moe_talker_code_predictor", "sliding_window": None, "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"], "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "model_type": "qwen3_omni_moe_talker",
        "accept_hidden_layer": 2,
        "audio_end_token_id": ids["<|audio_end|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_token_id": ids["<|audio_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "codec_bos_id": 66, "codec_eos_token_id": 67, "codec_nothink_id": 68, "codec_pad_id": 69,
        "codec_think_bos_id": 70, "codec_think_eos_id": 71,
        "num_code_groups": 4,
        "output_router_logits": False,
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
        "spatial_merge_size": 2,
        "thinker_hidden_size": _TEXT_QWEN3["hidden_size"],
        "speaker_id": {"chelsie": 65},
        "code_predictor_config": predictor,
        "text_config": text,
    }  # fmt: skip
