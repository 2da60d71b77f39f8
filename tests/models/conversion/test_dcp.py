# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's layout. Oracle: torch's own distributed checkpoint reader and writer."""

import filecmp
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file

from models.contract.errors import ConfigError, WeightMappingError
from models.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from models.conversion.dcp import dcp_to_hf, dcp_to_megatron, hf_to_dcp, megatron_to_dcp
from models.conversion.dcp_folder import open_dcp
from models.conversion.tiny import write_tiny_checkpoint
from models.conversion.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::FutureWarning:torch.*")
PREFIX = {"2025": "model.model.", "2026": "model."}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("dcp") / "hf", "qwen3_vl", moe=True, init="coded")


@pytest.fixture(scope="module")
def tensors(source) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(source.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def as_mindspeed(tensors: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + n: t.reshape(-1, t.shape[-1]) if ".experts." in n else t for n, t in tensors.items()}


def same(left: Path, right: Path) -> bool:
    compared = filecmp.dircmp(left, right)
    wrong = filecmp.cmpfiles(left, right, compared.common_files, shallow=False)[1:]
    return not (compared.left_only or compared.right_only or any(wrong))


@pytest.mark.parametrize("style", ["2025", "2026"])
def test_torch_reads_what_is_written(source, tensors, tmp_path, style) -> None:
    hf_to_dcp(source, tmp_path / "d", Options(), style=style)
    assert (tmp_path / "d" / "latest_checkpointed_iteration.txt").read_text() == "release"
    expected = as_mindspeed(tensors, PREFIX[style])
    state = {name: torch.full_like(value, float("nan")) for name, value in expected.items()} | {
        "checkpoint_version": 0.0
    }
    torch_dcp.load(state, storage_reader=torch_dcp.FileSystemReader(tmp_path / "d" / "release"), no_dist=True)
    assert state.pop("checkpoint_version") == 3.0
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    dcp_to_hf(tmp_path / "d", tmp_path / "hf", source, Options())
    assert same(source, tmp_path / "hf")


@pytest.mark.parametrize("style", ["2025", "2026"])
def test_what_torch_wrote_is_read(source, tensors, tmp_path, style) -> None:
    state = as_mindspeed(tensors, PREFIX[style]) | {"optimizer.step": torch.ones(3), "args": {"lr": 1}}
    torch_dcp.save(
        state, storage_writer=torch_dcp.FileSystemWriter(tmp_path / "d" / "iter_0000010"), no_dist=True
    )
    (tmp_path / "d" / "latest_checkpointed_iteration.txt").write_text("10")
    dcp_to_hf(tmp_path / "d", tmp_path / "hf", source, Options())
    assert same(source, tmp_path / "hf")


def test_dcp_and_megatron_convert_into_each_other(source, tmp_path) -> None:
    hf_to_megatron(source, tmp_path / "m", Options())
    megatron_to_dcp(tmp_path / "m", tmp_path / "d", source, Options())
    dcp_to_megatron(tmp_path / "d", tmp_path / "m2", source, Options())
    megatron_to_hf(tmp_path / "m2", tmp_path / "hf", source, Options())
    assert same(source, tmp_path / "hf")


def test_a_missing_or_foreign_tensor_is_refused(source, tensors, tmp_path) -> None:
    name = sorted(tensors)[7]
    for label, change in {
        "1 missing": lambda state: state.pop(PREFIX["2026"] + name),
        "1 unexpected": lambda state: state.update({PREFIX["2026"] + "model.other": torch.ones(2)}),
        "1 wrong shape": lambda state: state.update({PREFIX["2026"] + name: torch.ones(2)}),
    }.items():
        state = as_mindspeed(tensors, PREFIX["2026"])
        change(state)
        folder = tmp_path / label.replace(" ", "-")
        torch_dcp.save(state, storage_writer=torch_dcp.FileSystemWriter(folder), no_dist=True)
        with pytest.raises(WeightMappingError, match=label):
            dcp_to_hf(folder, tmp_path / "hf", source, Options())


def test_tied_output_layer_is_stored_on_demand(tmp_path) -> None:
    source = write_tiny_checkpoint(tmp_path / "s", "qwen3_vl", init="coded")
    hf_to_dcp(source, tmp_path / "d", Options(), tie_weight=True)
    metadata = torch_dcp.FileSystemReader(tmp_path / "d" / "release").read_metadata().state_dict_metadata
    assert "model.model.lm_head.weight" in metadata
    dcp_to_hf(tmp_path / "d", tmp_path / "hf", source, Options())
    assert same(source, tmp_path / "hf")


@pytest.mark.parametrize(("style", "prefix"), [("2025", "model.model."), ("2026", "model.")])
def test_merged_experts_are_as_mindspeed_has_them_and_come_back(tmp_path, style, prefix) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", "qwen3_omni", init="coded", dtype=torch.bfloat16)
    hf_to_dcp(source, tmp_path / "dcp", Options(), style=style, merge_experts=True)
    stored = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    merged = [f"{prefix}model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    with open_dcp(tmp_path / "dcp" / "release") as folder:
        assert not [name for name in folder.specs if "thinker." in name]
        talker = [name for name in folder.specs if name.startswith(f"{prefix}talker.")]
        assert len(talker) == len([name for name in stored if name.startswith("talker.")])
        up, down = (folder.read(name, 0, folder.specs[name].num_rows) for name in merged)
    experts = "thinker.model.layers.1.mlp.experts."
    for expert in range(len(up)):
        gate, other, last = (
            stored[f"{experts}{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        assert torch.equal(up[expert], torch.cat([gate, other]).T)
        assert torch.equal(down[expert], last.T)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "back", source, Options())
    names = [file.name for file in source.iterdir()]
    assert filecmp.cmpfiles(source, tmp_path / "back", names, shallow=False)[1:] == ([], [])
    dcp_to_megatron(tmp_path / "dcp", tmp_path / "m", source, Options())
    assert verify(source, tmp_path / "m")["is_equal"]


def test_nothing_to_merge_is_said(tmp_path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", "qwen3_vl", moe=True, init="coded")
    with pytest.raises(ConfigError, match="no experts to merge"):
        hf_to_dcp(source, tmp_path / "dcp", Options(), merge_experts=True)
    assert not (tmp_path / "dcp").exists()
