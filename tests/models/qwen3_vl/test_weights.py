# SPDX-License-Identifier: Apache-2.0
import pytest

from models.common.weight_rules import check_table, hf_tensors
from models.contract.errors import WeightMappingError
from models.contract.tiny_config import tiny_config
from models.qwen3_vl.config import ModelConfig
from models.qwen3_vl.weights import HUB, detect_layout, weight_table


def transposed(shape):
    return (*shape[:-2], shape[-1], shape[-2])


def shapes_of(config: dict) -> dict:
    return {name: t.shape for name, t in hf_tensors(weight_table(ModelConfig.from_hf(config))).items()}


def test_dense_table_has_every_tensor_of_transformers(hf_shapes) -> None:
    config = tiny_config("qwen3_vl")
    check_table(weight_table(ModelConfig.from_hf(config)))
    expected = hf_shapes(config)
    assert expected.pop("lm_head.weight") == expected["model.language_model.embed_tokens.weight"]  # tied
    assert shapes_of(config) == expected


def test_moe_table_has_every_tensor_with_experts_as_on_the_hub(hf_shapes) -> None:
    config = tiny_config("qwen3_vl", moe=True)
    check_table(weight_table(ModelConfig.from_hf(config)))
    expected = {n: transposed(s) if ".experts." in n else s for n, s in hf_shapes(config).items()}
    assert shapes_of(config) == expected


def test_tied_output_layer_is_a_copy_not_a_source() -> None:
    table = weight_table(ModelConfig.from_hf(tiny_config("qwen3_vl")))
    assert "lm_head.weight" not in hf_tensors(table)
    assert [copy.name for rule in table for copy in rule.copies] == ["lm_head.weight"]


def test_detect_layout_tells_the_expert_layouts_apart() -> None:
    hf = tiny_config("qwen3_vl", moe=True)
    config, hub = ModelConfig.from_hf(hf), shapes_of(hf)
    assert detect_layout(hub, config) == HUB
    saved = {n: transposed(s) if ".experts." in n else s for n, s in hub.items()}
    assert detect_layout(saved, config).experts == "fused_transposed"
    assert detect_layout(saved, config, experts="fused_transposed").experts == "fused_transposed"
    with pytest.raises(WeightMappingError, match="not stored as expected"):
        detect_layout(saved, config, experts="fused")


@pytest.mark.parametrize("ffn", [40, 80], ids=["H=2I", "H=I"])
def test_detect_layout_refuses_a_tie_unless_told(ffn: int) -> None:
    hf = tiny_config("qwen3_vl", moe=True)
    hf["text_config"]["moe_intermediate_size"] = ffn
    config, hub = ModelConfig.from_hf(hf), shapes_of(hf)
    with pytest.raises(WeightMappingError, match="--expert-layout"):
        detect_layout(hub, config)
    assert detect_layout(hub, config, experts="fused") == HUB


def test_detect_layout_refuses_another_family() -> None:
    config = ModelConfig.from_hf(tiny_config("qwen3_vl"))
    with pytest.raises(WeightMappingError, match="cannot tell where the decoder is"):
        detect_layout({"model.embed_tokens.weight": (600, 96)}, config)
