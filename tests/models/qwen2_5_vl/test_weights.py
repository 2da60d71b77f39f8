# SPDX-License-Identifier: Apache-2.0
from models.common.weight_rules import check_table, hf_tensors
from models.contract.families import load_architecture
from models.contract.tiny_config import tiny_config
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.weights import HUB, detect_layout, weight_table


def in_memory_names(name: str) -> str:
    """transformers keeps the model one level deeper than the files do."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def test_table_has_every_tensor_of_transformers(hf_shapes) -> None:
    config = tiny_config("qwen2_5_vl")
    table = weight_table(ModelConfig.from_hf(config))
    check_table(table)
    mine = {in_memory_names(name): tensor.shape for name, tensor in hf_tensors(table).items()}
    assert mine == hf_shapes(config)


def test_detect_layout_knows_both_spellings() -> None:
    config = ModelConfig.from_hf(tiny_config("qwen2_5_vl"))
    hub = {name: tensor.shape for name, tensor in hf_tensors(weight_table(config)).items()}
    assert detect_layout(hub, config) == HUB
    layout = detect_layout({in_memory_names(name): shape for name, shape in hub.items()}, config)
    assert (layout.text, layout.vision) == ("model.language_model.", "model.visual.")


def test_published_sizes_give_the_number_of_tensors_by_hand(published) -> None:
    # 28 decoder layers of 12 tensors, 32 vision blocks of 12 (norms 2, qkv 2, proj 2, mlp 6), embedding, final norm and
    # output layer, patch embedding, merger of 5.
    table = weight_table(load_architecture(published("qwen2_5_vl_7b")))
    assert len(hf_tensors(table)) == 28 * 12 + 32 * 12 + 3 + 1 + 5
