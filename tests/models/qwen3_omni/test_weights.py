# SPDX-License-Identifier: Apache-2.0
import re

from models.common.weight_rules import check_table, hf_tensors
from models.contract.tiny_config import tiny_config
from models.conversion.tiny_omni import untouched_shapes
from models.qwen3_omni.config import ModelConfig
from models.qwen3_omni.weights import HUB, UNTOUCHED, detect_layout, weight_table


def without_experts(shapes: dict) -> dict:
    return {name: shape for name, shape in shapes.items() if ".experts." not in name}


def test_table_and_untouched_have_every_tensor_of_transformers(hf_shapes) -> None:
    hf = tiny_config("qwen3_omni")
    table = weight_table(ModelConfig.from_hf(hf))
    check_table(table)
    mine = {name: tensor.shape for name, tensor in hf_tensors(table).items()}
    untouched = untouched_shapes(hf)
    assert all(name.startswith(UNTOUCHED) for name in untouched)
    expected = hf_shapes(hf)
    assert without_experts(mine | untouched) == without_experts(expected)
    # transformers fuses experts in memory; per expert, the same numbers of rows and columns
    for name, shape in expected.items():
        if name.endswith("gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            halves = [
                (mine | untouched)[f"{stem}{e}.{part}_proj.weight"]
                for e in range(shape[0])
                for part in ("gate", "up")
            ]
            assert set(halves) == {(shape[1] // 2, shape[2])}


def test_detect_layout_knows_separate_experts() -> None:
    config = ModelConfig.from_hf(tiny_config("qwen3_omni"))
    names = {name: tensor.shape for name, tensor in hf_tensors(weight_table(config)).items()}
    assert detect_layout(names, config) == HUB
    assert sum(bool(re.search(r"experts\.\d+\.", name)) for name in names) == 4 * 8 * 3
