# SPDX-License-Identifier: Apache-2.0
"""Tensors of a tiny Qwen3-Omni that training does not touch: the talker and code2wav, by their names on disk."""

from typing import Any

from models.common.weight_rules import Shape

Shapes = dict[str, Shape]


def untouched_shapes(config: dict[str, Any]) -> Shapes:
    """Shapes by name, from the whole ``config.json``; empty for a config without a talker."""
    if "talker_config" not in config:
        return {}
    return _talker(config["talker_config"]) | _code2wav(config["code2wav_config"])


def _talker(config: dict[str, Any]) -> Shapes:
    text, predictor = config["text_config"], config["code_predictor_config"]
    hidden, ffn, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    shapes: Shapes = {"talker.model.codec_embedding.weight": (vocab, hidden)}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"talker.model.layers.{layer}."
        shapes |= _attention(prefix, text, with_norms=True) | {
            f"{prefix}mlp.gate.weight": (text["num_experts"], hidden)
        }
        for expert in range(text["num_experts"]):
            shapes |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, text["moe_intermediate_size"])
        shapes |= _mlp(f"{prefix}mlp.shared_expert.", hidden, text["shared_expert_intermediate_size"])
        shapes |= {f"{prefix}mlp.shared_expert_gate.weight": (1, hidden)}
    shapes |= {"talker.model.norm.weight": (hidden,), "talker.codec_head.weight": (vocab, hidden)}
    for name in ("text_projection", "hidden_projection"):
        shapes |= _affine(f"talker.{name}.linear_fc1", ffn, config["thinker_hidden_size"])
        shapes |= _affine(f"talker.{name}.linear_fc2", hidden, ffn)
    width, codes = predictor["hidden_size"], predictor["vocab_size"]
    for layer in range(predictor["num_hidden_layers"]):
        prefix = f"talker.code_predictor.model.layers.{layer}."
        shapes |= _attention(prefix, predictor, with_norms=True)
        shapes |= _mlp(f"{prefix}mlp.", width, predictor["intermediate_size"])
    shapes |= {"talker.code_predictor.model.norm.weight": (width,)}
    for group in range(predictor["num_code_groups"] - 1):
        shapes |= {f"talker.code_predictor.model.codec_embedding.{group}.weight": (codes, width)}
        shapes |= {f"talker.code_predictor.lm_head.{group}.weight": (codes, width)}
    return shapes


def _code2wav(config: dict[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    codes = config["codebook_size"] * config["num_quantizers"]
    shapes: Shapes = {"code2wav.code_embedding.weight": (codes, hidden)}
    text = config | {"head_dim": hidden // config["num_attention_heads"]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"code2wav.pre_transformer.layers.{layer}."
        shapes |= _attention(prefix, text, with_norms=False) | _mlp(
            f"{prefix}mlp.", hidden, config["intermediate_size"]
        )
        shapes |= {f"{prefix}{part}_layer_scale.scale": (hidden,) for part in ("self_attn", "mlp")}
    shapes |= {"code2wav.pre_transformer.norm.weight": (hidden,)}
    for index, factor in enumerate(config["upsampling_ratios"]):
        prefix = f"code2wav.upsample.{index}"
        shapes |= _conv(f"{prefix}.0.conv", (hidden, hidden, factor), hidden)
        shapes |= {f"{prefix}.1.gamma": (hidden,)} | _conv(f"{prefix}.1.dwconv.conv", (hidden, 1, 7), hidden)
        shapes |= {f"{prefix}.1.norm.{kind}": (hidden,) for kind in ("weight", "bias")}
        shapes |= _affine(f"{prefix}.1.pwconv1", 4 * hidden, hidden) | _affine(
            f"{prefix}.1.pwconv2", hidden, 4 * hidden
        )
    width = config["decoder_dim"]
    shapes |= _conv("code2wav.decoder.0.conv", (width, hidden, 7), width)
    for index, rate in enumerate(config["upsample_rates"]):
        shapes |= _decoder_block(f"code2wav.decoder.{index + 1}.block", width, rate)
        width //= 2
    last = len(config["upsample_rates"]) + 1
    shapes |= _snake(f"code2wav.decoder.{last}", width)
    return shapes | _conv(f"code2wav.decoder.{last + 1}.conv", (1, width, 7), 1)


def _decoder_block(prefix: str, width: int, rate: int) -> Shapes:
    half = width // 2
    shapes = _snake(f"{prefix}.0", width) | _conv(f"{prefix}.1.conv", (width, half, 2 * rate), half)
    for unit in (2, 3, 4):
        for number, kernel in ((1, 7), (2, 1)):
            shapes |= _snake(f"{prefix}.{unit}.act{number}", half)
            shapes |= _conv(f"{prefix}.{unit}.conv{number}.conv", (half, half, kernel), half)
    return shapes


def _attention(prefix: str, text: dict[str, Any], *, with_norms: bool) -> Shapes:
    hidden, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes: Shapes = {
        f"{prefix}self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    return shapes | (
        {f"{prefix}self_attn.{part}_norm.weight": (head,) for part in "qk"} if with_norms else {}
    )


def _mlp(prefix: str, hidden: int, ffn: int) -> Shapes:
    up = {f"{prefix}{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
    return up | {f"{prefix}down_proj.weight": (hidden, ffn)}


def _affine(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _conv(name: str, shape: Shape, out_channels: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (out_channels,)}


def _snake(name: str, channels: int) -> Shapes:
    return {f"{name}.alpha": (channels,), f"{name}.beta": (channels,)}
