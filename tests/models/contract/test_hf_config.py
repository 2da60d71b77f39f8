# SPDX-License-Identifier: Apache-2.0
import pytest

from models.contract.errors import ConfigError
from models.contract.hf_config import HfSection


def test_all_problems_of_a_section_come_at_once() -> None:
    section = HfSection({"depth": "four", "bias": 1}, "config.json: vision_config")
    section.integer("depth")
    section.boolean("bias")
    section.integer("num_heads", "num_attention_heads")
    with pytest.raises(ConfigError) as error:
        section.check()
    text = str(error.value)
    assert "3 problem(s) in the HF config" in text
    assert "'depth' must be an integer, is 'four'" in text
    assert "'bias' must be true or false, is 1" in text
    assert "missing field 'num_heads or num_attention_heads'" in text


def test_a_bool_is_no_number() -> None:
    section = HfSection({"layers": True, "eps": False}, "x")
    section.integer("layers")
    section.number("eps")
    assert len(section.problems) == 2


def test_null_counts_as_missing_and_the_second_spelling_is_taken() -> None:
    assert (
        HfSection({"num_experts": None, "num_local_experts": 8}, "x").integer(
            "num_experts", "num_local_experts"
        )
        == 8
    )


def test_missing_section_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="config has no 'vision_config'") as error:
        HfSection({"model_type": "qwen3_vl"}, "config.json").section("vision_config")
    assert "model_type" in str(error.value)


def test_section_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an object"):
        HfSection([], "config.json: text_config")  # type: ignore[arg-type]
