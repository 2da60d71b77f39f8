# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from models.datasets.energon import open_dataset, worker_config


def test_reader_keeps_no_record_of_what_it_read(scenes_folder: Path) -> None:
    reader = open_dataset(str(scenes_folder), "train", worker_config(0, 1, 0, 0), training=False).reader()
    for index in (0, 1, 0, 1):
        assert reader[index]["__key__"]
        with reader._open_itarfile(0) as tar_file:
            assert tar_file.members == []
