# SPDX-License-Identifier: Apache-2.0
"""What a conversion wrote is checked without its source: every changed byte must be seen, by `verify` and by export."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from models.contract.errors import WeightMappingError
from models.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from models.conversion.dcp import hf_to_dcp
from models.conversion.tiny import write_tiny_checkpoint
from models.entry.convert import main


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    source = write_tiny_checkpoint(folder / "hf", "qwen3_vl", moe=True, init="coded", dtype=torch.bfloat16)
    hf_to_megatron(source, folder / "m", Options())
    return source, folder / "m"


@pytest.fixture
def megatron(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted[1], tmp_path / "m"))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def test_untouched_checkpoint_holds(megatron, capsys) -> None:
    assert main(["verify", str(megatron)]) == 0
    assert "recorded checksums hold" in capsys.readouterr().out


@pytest.mark.parametrize("where", [0.0, 0.1, 0.37, 0.62, 0.9])
def test_one_flipped_bit_is_seen(converted, megatron, tmp_path, capsys, where) -> None:
    file = max((megatron / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip(file, int(file.stat().st_size * where) + 700)
    assert main(["verify", str(megatron)]) == 1
    assert f"different   {file.name}: bytes" in capsys.readouterr().out
    with pytest.raises(WeightMappingError, match="not those that were written"):
        megatron_to_hf(megatron, tmp_path / "out", converted[0], Options())
    assert not (tmp_path / "out").exists()


def test_every_file_of_the_folder_is_covered(megatron, capsys) -> None:
    for file in sorted((megatron / "release").iterdir()):
        if file.name == "checksums.json":
            continue
        before = file.read_bytes()
        for broken in (before[:-1], before + b"x", bytes([before[0] ^ 1]) + before[1:]):
            file.write_bytes(broken)
            assert main(["verify", str(megatron)]) == 1, file.name
            assert file.name in capsys.readouterr().out
        file.unlink()
        if file.name != ".metadata":  # by which a checkpoint is known
            assert main(["verify", str(megatron)]) == 1, file.name
            assert f"missing     1: {file.name}" in capsys.readouterr().out
        file.write_bytes(before)
    (megatron / "release" / "more.distcp").write_bytes(b"x")
    assert main(["verify", str(megatron), "--out", str(megatron / "conversion.json")]) == 1
    assert "unexpected  1: more.distcp" in capsys.readouterr().out
    report = json.loads((megatron / "conversion.json").read_text())
    assert report["num_equal"] == report["num_tensors"] > 100
    assert (report["different"], report["missing"]) == ([], [])


def test_dcp_has_checksums_too(converted, tmp_path, capsys) -> None:
    hf_to_dcp(converted[0], tmp_path / "dcp", Options())
    assert main(["verify", str(tmp_path / "dcp")]) == 0
    flip(tmp_path / "dcp" / "release" / "__0_0.distcp", 5000)
    assert main(["verify", str(tmp_path / "dcp")]) == 1
    capsys.readouterr()


def test_without_a_record_verify_says_so(megatron, tmp_path, capsys) -> None:
    (megatron / "release" / "checksums.json").unlink()
    assert main(["verify", str(megatron)]) == 1
    assert "no checksums were recorded" in capsys.readouterr().err
    (megatron / "release" / "checksums.json").write_text("{}")
    assert main(["verify", str(megatron)]) == 1
    assert "the recorded checksums cannot be read" in capsys.readouterr().err


def test_options_that_compare_need_another_checkpoint(megatron, capsys) -> None:
    assert main(["verify", str(megatron), "--cast"]) == 1
    assert "RIGHT is missing" in capsys.readouterr().err
