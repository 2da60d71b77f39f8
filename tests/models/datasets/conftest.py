# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from models.contract.families import load_architecture
from models.contract.tiny_config import tiny_config
from models.conversion.tiny_processor import write_processor_files


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Folder with config and processor (no weights) of a family's tiny model, and its architecture."""
    made = {}

    def get(family: str) -> tuple[Path, object]:
        if family not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / family
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(tiny_config(family)), encoding="utf-8")
            write_processor_files(folder, family)
            made[family] = (folder, load_architecture(folder))
        return made[family]

    return get


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory) -> Path:
    """A small prepared dataset: 96 training and 24 held-out scenes."""
    from models.datasets.prepare.job import write_dataset
    from models.datasets.prepare.synthetic import ConvertScene

    folder = tmp_path_factory.mktemp("datasets") / "scenes"
    splits = {"train": [("train", i) for i in range(96)], "val": [("val", i) for i in range(24)]}
    write_dataset(folder, splits, ConvertScene("scenes", 0), about={"source": "test"}, shard_size=40)
    return folder
