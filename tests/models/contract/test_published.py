# SPDX-License-Identifier: Apache-2.0
"""Published sizes parse, and say what their checkpoints say."""

import pytest

from models.contract.errors import ConfigError
from models.contract.families import PUBLISHED, published_architecture, published_config

NAMES = sorted(file.stem for file in PUBLISHED.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_published_size_parses_and_is_consistent(name: str) -> None:
    architecture = published_architecture(name)
    assert architecture.vision.out_hidden_size == architecture.text.hidden_size
    assert sum(architecture.text.mrope_section) * 2 == architecture.text.kv_channels
    assert max(architecture.vision.deepstack_visual_indexes, default=0) < architecture.vision.num_layers


def test_published_rope_theta_is_the_checkpoints_not_the_scripts() -> None:
    """The reference's shell scripts train Qwen3-VL-30B-A3B at 1e6; its checkpoint says 5e6."""
    assert published_architecture("qwen3_vl_30b_a3b").text.rotary_base == 5e6
    assert published_architecture("qwen3_omni_30b_a3b").text.rotary_base == 1e6


def test_published_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="qwen2_5_vl_7b"):
        published_config("qwen2_5_vl_8b")
