# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from models.contract.errors import ConfigError
from models.contract.families import detect_family, read_hf_config


def test_family_follows_the_model_type() -> None:
    assert detect_family({"model_type": "qwen3_vl_moe"}) == "qwen3_vl"


def test_family_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown architecture") as caught:
        detect_family({"model_type": "llava"})
    assert "'llava'" in str(caught.value)


def test_config_missing_or_half_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder not found"):
        read_hf_config(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3')
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_hf_config(tmp_path)
