# SPDX-License-Identifier: Apache-2.0
"""Logits of a converted checkpoint against transformers. A fault that no shape shows must be seen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.contract.errors import ConfigError
from models.conversion.convert import Options, hf_to_megatron
from models.conversion.tiny import write_tiny_checkpoint
from models.entry.convert import main
from models.entry.logits import verify_logits
from models.generation.logits import MAX_ROUNDING_RATIO, compare_logits

BIAS = "model.visual.blocks.0.attn.qkv.bias"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logits") / "hf"
    return write_tiny_checkpoint(folder, "qwen3_vl", init="random", dtype=torch.bfloat16, seed=5)


def test_converted_checkpoint_is_close_in_both_formats(source, tmp_path, capsys) -> None:
    hf_to_megatron(source, tmp_path / "m", Options())
    out = tmp_path / "conversion.json"
    assert main(["verify", str(source), str(tmp_path / "m"), "--logits", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["logits"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    assert all(row["is_close"] and row["num_real_tokens"] > 150 for row in rows)
    assert rows[0]["max_error"] < 1e-5  # measured 1.2e-6
    assert capsys.readouterr().out.count("close to transformers'") == 2


def test_vision_heads_in_another_order_are_noticed(source, tmp_path) -> None:
    wrong = Path(shutil.copytree(source, tmp_path / "wrong"))
    index = json.loads((wrong / "model.safetensors.index.json").read_text())["weight_map"]
    file = wrong / index[BIAS]
    tensors = load_file(file)
    tensors[BIAS] = tensors[BIAS].reshape(3, 4, 16).transpose(0, 1).reshape(-1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    fp32, _ = verify_logits(source, wrong)
    assert not fp32.is_close


def test_two_megatron_checkpoints_have_no_reference(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no Hugging Face folder"):
        verify_logits(tmp_path / "a", tmp_path / "b")


def test_limits_of_both_formats() -> None:
    reference = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    off = reference.clone()
    off[3, 4] += 2e-4 * float(reference.abs().max())
    assert compare_logits("fp32", reference, reference).is_close
    assert not compare_logits("fp32", off, reference).is_close
    rounded = reference.bfloat16().float()
    assert compare_logits("bf16", rounded, reference, rounded).is_close
    twice = reference + (1.1 * MAX_ROUNDING_RATIO) * (rounded - reference)
    assert not compare_logits("bf16", twice, reference, rounded).is_close


def test_sequences_of_another_length_and_nan_are_not_close() -> None:
    reference = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert not compare_logits("fp32", reference[:-1], reference).is_close
    broken = reference.clone()
    broken[0, 0] = float("nan")
    assert not compare_logits("fp32", broken, reference).is_close
    assert not compare_logits("bf16", broken, reference, reference.bfloat16().float()).is_close


def test_padded_vocabulary_is_left_out() -> None:
    reference = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(reference, (0, 6), value=99.0)
    row = compare_logits("fp32", padded, reference)
    assert (row.is_close, row.same_token, row.num_real_tokens) == (True, 1.0, 20)
