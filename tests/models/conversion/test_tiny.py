# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from models.contract.errors import ConfigError
from models.contract.families import (
    architecture_from_hf,
    load_architecture,
    published_architecture,
    published_names,
)
from models.contract.tiny_config import sized_config, tiny_config
from models.entry.convert import main
from models.training.initial_weights import load_initial_weights


def test_folder_without_weights_has_all_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    assert main(["tiny", str(folder), "--family", "qwen3_vl", "--no-weights"]) == 0
    assert load_architecture(folder) == architecture_from_hf(tiny_config("qwen3_vl"))
    assert {"tokenizer.json", "preprocessor_config.json"} <= {file.name for file in folder.iterdir()}
    with pytest.raises(ConfigError, match="holds no weights") as caught:
        load_initial_weights([], folder, num_layers=None)
    assert 'set model.init = "random"' in caught.value.fix


@pytest.mark.parametrize("size", published_names())
def test_sized_config_has_the_published_sizes(size: str) -> None:
    made, published = architecture_from_hf(sized_config(size)), published_architecture(size)
    assert (made.text, made.vision, made.audio) == (published.text, published.vision, published.audio)
    assert made.tokens != published.tokens
