# SPDX-License-Identifier: Apache-2.0
"""The checker is attacked: every planted fault must be found, and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion.convert import Options, hf_to_megatron
from models.conversion.tiny import write_tiny_checkpoint
from models.conversion.verify import verify

LAYER = "model.language_model.layers.1."
GROUP_ROWS = 3 * 16  # query rows of one group in the tiny model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "source"
    return write_tiny_checkpoint(folder, "qwen3_vl", moe=True, init="coded", dtype=torch.bfloat16)


@pytest.fixture
def other(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "other"))


def plant(folder: Path, change) -> None:
    index_file = folder / "model.safetensors.index.json"
    weight_map = json.loads(index_file.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    tensors = {name: value for file in files for name, value in load_file(folder / file).items()}
    change(tensors)
    placed = {name: weight_map.get(name, files[0]) for name in tensors}
    for file in files:
        save_file({n: t.contiguous() for n, t in tensors.items() if placed[n] == file}, folder / file)
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def zero(tensors) -> None:
    tensors[f"{LAYER}self_attn.o_proj.weight"].zero_()


def swap_layers(tensors) -> None:
    a, b = f"{LAYER}input_layernorm.weight", "model.language_model.layers.2.input_layernorm.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def swap_gate_and_up(tensors) -> None:
    name = f"{LAYER}mlp.experts.gate_up_proj"
    tensors[name] = tensors[name].roll(tensors[name].shape[2] // 2, dims=2)


def next_group(tensors) -> None:
    name = f"{LAYER}self_attn.q_proj.weight"
    tensors[name] = tensors[name].roll(GROUP_ROWS, dims=0)


def vision_heads_for_thirds(tensors) -> None:
    name = "model.visual.blocks.0.attn.qkv.bias"
    tensors[name] = tensors[name].reshape(3, 4, 16).transpose(0, 1).reshape(-1)


def transpose_square(tensors) -> None:
    name = "model.visual.merger.linear_fc1.weight"
    tensors[name] = tensors[name].T


def one_bit(tensors) -> None:
    tensors["model.visual.blocks.2.mlp.linear_fc1.weight"].view(torch.int16)[3, 5] ^= 1


def negative_zero(tensors) -> None:
    tensors[f"{LAYER}self_attn.q_norm.weight"][3] = -0.0


def next_expert(tensors) -> None:
    name = f"{LAYER}mlp.experts.down_proj"
    tensors[name] = tensors[name].roll(1, dims=0)


FAULTS = [
    zero, swap_layers, swap_gate_and_up, next_group, vision_heads_for_thirds, transpose_square, one_bit, negative_zero,
    next_expert,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_verify_finds_a_planted_fault(source, other, fault) -> None:
    before = {n: t for file in other.glob("*.safetensors") for n, t in load_file(file).items()}
    plant(other, fault)
    after = {n: t for file in other.glob("*.safetensors") for n, t in load_file(file).items()}
    touched = {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}
    report = verify(source, other)
    assert not report["is_equal"]
    assert {row["name"] for row in report["different"]} == touched
    assert report["num_equal"] == report["num_tensors"] - len(touched)
    assert all(row["num_different"] for row in report["worst"])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_verify_finds_it_through_a_megatron_checkpoint(source, other, tmp_path, fault) -> None:
    plant(other, fault)
    hf_to_megatron(other, tmp_path / "m", Options())
    assert verify(other, tmp_path / "m")["is_equal"]
    report = verify(source, tmp_path / "m")
    assert 1 <= len(report["different"]) <= 2
    assert not report["missing"] + report["unexpected"]


def test_verify_of_two_megatron_checkpoints(source, other, tmp_path) -> None:
    hf_to_megatron(source, tmp_path / "a", Options())
    plant(other, zero)
    hf_to_megatron(other, tmp_path / "b", Options())
    assert verify(tmp_path / "a", tmp_path / "a" / "release")["is_equal"]
    different = verify(tmp_path / "a", tmp_path / "b")["different"]
    assert [row["name"] for row in different] == [
        "language_model.decoder.layers.1.self_attention.linear_proj.weight"
    ]


def test_verify_names_another_number_format(source, tmp_path) -> None:
    hf_to_megatron(source, tmp_path / "m", Options(dtype=torch.float32))
    report = verify(source, tmp_path / "m")
    assert len(report["different"]) == report["num_tensors"]
    assert "bfloat16 against torch.float32" in report["different"][0]["detail"]
    assert verify(source, tmp_path / "m", cast=True)["is_equal"]


def test_verify_reports_checksums_and_json(source) -> None:
    report = json.loads(json.dumps(verify(source, source)))
    assert report["is_equal"]
    assert report["num_equal"] == report["num_tensors"] == len(report["tensors"])
    assert all(row["checksum"] == row["other_checksum"] for row in report["tensors"])
    assert len({row["checksum"] for row in report["tensors"]}) == report["num_tensors"]


def test_verify_declares_a_tied_output_layer(tmp_path) -> None:
    left = write_tiny_checkpoint(tmp_path / "left", "qwen3_vl", init="coded")
    right = Path(shutil.copytree(left, tmp_path / "right"))
    name = "model.language_model.embed_tokens.weight"
    plant(right, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    report = verify(left, right)
    assert report["is_equal"]
    assert report["declared"] == {"lm_head.weight": f"tied to {name}"}
