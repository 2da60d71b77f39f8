# SPDX-License-Identifier: Apache-2.0
"""Whole models whose layers take the short way, kernels interpreted, against transformers and across processes."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from models.common.dense_layer import DenseLayer
from models.common.settings import ModelSettings
from models.parity.oracles import TINY
from models.parity.single import LIMITS, make_pair, measure_rounding
from tests.models.common.short_way import short_way_everywhere

pytestmark = pytest.mark.usefixtures("single_process")


def short_layers(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, DenseLayer) and layer._is_short]


@pytest.mark.slow  # interpreted kernels are slow
@pytest.mark.parametrize(("name", "changes"), [
    *((name, {}) for name in TINY),
    ("qwen3_vl", {"recompute": "full", "recompute_num_layers": 1, "recompute_vision": True}),
])  # fmt: skip
def test_model_equals_transformers(name: str, changes: dict[str, Any]) -> None:
    with short_way_everywhere():
        pair = make_pair(name, ModelSettings(moe_aux_loss_coeff=0.0, **changes))
    towers: list[Any] = [*pair.model.vision_model.layers, *pair.model.language_model.decoder.layers]
    assert short_layers(pair.model) == [layer for layer in towers if isinstance(layer.mlp, MLP)]
    made, reference = pair.case("mixed")
    found = measure_rounding(pair, made, reference, gradient_floor=LIMITS["fp32"].gradient_floor)
    assert found.dictated.num_gradients == len(pair.rules)
    assert not found.exceeding(LIMITS["fp32"]), str(found)


def test_what_a_layer_puts_out_is_no_view() -> None:
    with short_way_everywhere():
        model = make_pair("qwen2_5_vl").model
    layer = short_layers(model.language_model)[0]
    states = torch.randn(6, 1, layer.config.hidden_size, requires_grad=True)
    angles = torch.zeros(6, 1, 1, layer.config.kv_channels)
    out = layer(states, attention_mask=None, rotary_pos_emb=angles)[0]
    assert out._base is None  # pipeline stages free what they sent on
    assert out.requires_grad


@pytest.mark.parametrize(
    "changes", [{"recompute": "selective"}, {"tensor_model_parallel_size": 1, "fp8": "tensorwise"}]
)
def test_short_way_is_closed_where_it_does_not_lead(changes: dict[str, Any]) -> None:
    with short_way_everywhere():
        model = make_pair("qwen2_5_vl", ModelSettings(moe_aux_loss_coeff=0.0, **changes)).model
    assert not short_layers(model.language_model)
    assert short_layers(model.vision_model)
