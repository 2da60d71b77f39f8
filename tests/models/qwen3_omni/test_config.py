# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni configs: the thinker's sections, and what the published file leaves out."""

import copy

import pytest

from models.contract.errors import ConfigError
from models.contract.families import published_config
from models.qwen3_omni.config import ModelConfig


def test_published_file_says_what_it_says() -> None:
    config = ModelConfig.from_hf(published_config("qwen3_omni_30b_a3b"))
    assert (config.text.num_layers, config.text.vocab_size, config.text.rotary_base) == (48, 152064, 1e6)
    assert config.tokens.audio == 151675
    assert config.position_id_per_seconds == 13
    assert config.audio is not None
    assert (config.audio.num_layers, config.audio.hidden_size, config.audio.n_window) == (32, 1280, 50)


def test_side_of_the_position_table_follows_from_the_image_size() -> None:
    hub = copy.deepcopy(published_config("qwen3_omni_30b_a3b"))
    vision = hub["thinker_config"]["vision_config"]
    vision.pop("num_position_embeddings", None)
    vision["image_size"] = 768
    assert ModelConfig.from_hf(hub).vision.num_position_embeddings == 48**2


def test_thinker_decides_on_tied_embeddings_where_it_says_so() -> None:
    hub = copy.deepcopy(published_config("qwen3_omni_30b_a3b"))
    hub["thinker_config"]["text_config"]["tie_word_embeddings"] = False
    hub["thinker_config"].pop("tie_word_embeddings", None)
    assert not ModelConfig.from_hf(hub).text.tie_word_embeddings
    hub["thinker_config"]["tie_word_embeddings"] = True
    assert ModelConfig.from_hf(hub).text.tie_word_embeddings


def test_missing_audio_section_is_named() -> None:
    hub = copy.deepcopy(published_config("qwen3_omni_30b_a3b"))
    del hub["thinker_config"]["audio_config"]
    with pytest.raises(ConfigError, match="config has no 'audio_config'"):
        ModelConfig.from_hf(hub)


def test_output_width_must_fit_the_decoder() -> None:
    hub = copy.deepcopy(published_config("qwen3_omni_30b_a3b"))
    hub["thinker_config"]["audio_config"]["output_dim"] = 2049
    with pytest.raises(ConfigError, match="output width 2049 differs"):
        ModelConfig.from_hf(hub)
