# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from models.contract.errors import RunError
from models.contract.sentinel import Sentinel, sentinel_file

FOUND = Sentinel(
    started_at="2026-01-05T08:00:00+00:00", device_names=("a", "b"), dtype="bfloat16", matmul_size=8192,
    matmul_tflops=(790.5, 780.25), matmul_best_tflops=(800.0, 790.0), all_reduce_bytes=2**28, all_reduce_gb_per_s=410.0,
)  # fmt: skip


def test_sentinel_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = sentinel_file(tmp_path, "before")
    FOUND.write(file)
    assert Sentinel.read(file) == FOUND
    assert [item.name for item in tmp_path.iterdir()] == ["sentinel-before.json"]
    assert FOUND.slowest_tflops == 780.25


@pytest.mark.parametrize(
    ("old", "new"), [("790.5", "NaN"), ("790.5", "0"), ("790.5", '"fast"'), ("8192", "-1"), ("}", "")]
)
def test_a_damaged_file_is_named(old: str, new: str, tmp_path: Path) -> None:
    file = sentinel_file(tmp_path, "after")
    file.write_text(FOUND.model_dump_json().replace(old, new))
    with pytest.raises(RunError, match="a sentinel measurement cannot be read") as caught:
        Sentinel.read(file)
    assert caught.value.where == str(file)
