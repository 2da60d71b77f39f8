# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL configs as the hub writes them (flat) and as transformers 5 does."""

import copy
import json
from typing import Any

import pytest
import transformers

from models.contract.errors import ConfigError
from models.contract.families import published_config
from models.qwen2_5_vl.config import ModelConfig


@pytest.fixture
def hub() -> dict[str, Any]:
    return copy.deepcopy(published_config("qwen2_5_vl_7b"))


def test_hub_file_and_transformers_5_file_give_the_same(hub: dict[str, Any]) -> None:
    saved = json.loads(transformers.Qwen2_5_VLConfig(**copy.deepcopy(hub)).to_json_string(use_diff=True))
    assert "text_config" in saved
    assert "text_config" not in hub
    assert ModelConfig.from_hf(saved) == ModelConfig.from_hf(hub)


def test_hub_file_says_what_it_says(hub: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(hub)
    assert (config.text.num_layers, config.text.hidden_size, config.text.num_query_groups) == (28, 3584, 4)
    assert (config.text.kv_channels, config.text.mrope_section, config.text.rotary_base) == (
        128,
        (16, 24, 24),
        1e6,
    )
    assert config.text.add_qkv_bias
    assert not config.text.mrope_interleaved
    assert config.vision.fullatt_block_indexes == (7, 15, 23, 31)
    assert config.vision.patch_dim == 1176


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "rope_theta", "tie_word_embeddings", "image_token_id"]
)
def test_missing_field_is_named(hub: dict[str, Any], field: str) -> None:
    del hub[field]
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_hf(hub)


def test_missing_sections_of_rope_are_named(hub: dict[str, Any]) -> None:
    del hub["rope_scaling"]
    with pytest.raises(ConfigError, match="mrope_section"):
        ModelConfig.from_hf(hub)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, "sum to head_dim / 2 = 64"),
        ({"hidden_size": 3600}, "differs from the decoder's hidden_size"),
    ],
)
def test_what_is_not_implemented_is_refused(hub: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(hub | change)
    assert words in str(error.value)


def test_full_attention_outside_the_tower_is_refused(hub: dict[str, Any]) -> None:
    hub["vision_config"]["fullatt_block_indexes"] = [7, 32]
    with pytest.raises(ConfigError, match="fullatt_block_indexes"):
        ModelConfig.from_hf(hub)
