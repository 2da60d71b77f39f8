# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL configs, dense and MoE, as the hub writes them and as transformers 5 does."""

import copy
import json
from typing import Any

import pytest
import transformers

from models.contract.errors import ConfigError
from models.contract.families import published_config
from models.qwen3_vl.config import ModelConfig

CLASSES = {"qwen3_vl_8b": "Qwen3VLConfig", "qwen3_vl_30b_a3b": "Qwen3VLMoeConfig"}


@pytest.mark.parametrize("name", CLASSES)
def test_hub_file_and_transformers_5_file_give_the_same(name: str) -> None:
    hub = published_config(name)
    saved = json.loads(
        getattr(transformers, CLASSES[name])(**copy.deepcopy(hub)).to_json_string(use_diff=True)
    )
    assert "rope_parameters" in saved["text_config"]
    assert ModelConfig.from_hf(saved) == ModelConfig.from_hf(hub)


def test_experts_are_read() -> None:
    moe = ModelConfig.from_hf(published_config("qwen3_vl_30b_a3b")).text.moe
    assert moe is not None
    assert (moe.num_experts, moe.topk, moe.ffn_hidden_size, moe.dense_layers) == (128, 8, 768, ())


def test_dense_layers_follow_from_step_and_list() -> None:
    hub = copy.deepcopy(published_config("qwen3_vl_30b_a3b"))
    hub["text_config"] |= {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    moe = ModelConfig.from_hf(hub).text.moe
    assert moe is not None
    assert moe.dense_layers == (0, 2, 3, 4)


def test_top_level_decides_on_tied_embeddings() -> None:
    hub = copy.deepcopy(published_config("qwen3_vl_30b_a3b"))
    hub["text_config"]["tie_word_embeddings"] = (
        True  # transformers' default for the text part, without meaning
    )
    assert not ModelConfig.from_hf(hub).text.tie_word_embeddings


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("text_config", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("text_config", {"norm_topk_prob": False}, "norm_topk_prob = False is not supported"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("vision_config", {"deepstack_visual_indexes": [8, 16, 27]}, "must lie in 0..26"),
        ("vision_config", {"num_position_embeddings": 2300}, "perfect square"),
    ],
)
def test_bad_field_is_named(section: str, change: dict[str, Any], words: str) -> None:
    hub = copy.deepcopy(published_config("qwen3_vl_30b_a3b"))
    hub[section] |= change
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(hub)
    assert words in str(error.value)


def test_sectioned_rope_is_refused() -> None:
    hub = copy.deepcopy(published_config("qwen3_vl_8b"))
    rope = "rope_parameters" if "rope_parameters" in hub["text_config"] else "rope_scaling"
    hub["text_config"][rope]["mrope_interleaved"] = False
    with pytest.raises(ConfigError, match="mrope_interleaved = False is not supported"):
        ModelConfig.from_hf(hub)
