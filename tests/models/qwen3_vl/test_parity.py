# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, dense and MoE, against transformers: logits, loss, every gradient, and breaks that must show."""

import dataclasses

import pytest
import torch

from models.common.rope import MultimodalRope
from models.common.settings import ModelSettings
from models.parity.cases import CASES, pack
from models.parity.compare import compare
from models.parity.single import Pair, make_pair

pytestmark = pytest.mark.usefixtures("single_process")

# Worst measured: logits 1.1e-6, loss 4e-7, gradients 2.3e-6. Every break below is above 1e-2.
LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_model_equals_transformers(name: str, case: str) -> None:
    pair = make_pair(name)
    made, reference = pair.case(case)
    result = compare(pair.model, made.batch, reference)
    assert result.logits < LOGITS
    assert result.loss < LOSS
    assert result.gradient < GRADIENT, result.worst
    assert result.num_gradients == len(pair.rules)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_packed_row_equals_padded_rows(name: str) -> None:
    pair = make_pair(name)
    made, reference = pair.case("mixed")
    losses = pair.model(pack(made.batch))
    assert losses.sum().item() == pytest.approx(reference.token_losses.sum().item(), rel=1e-6)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_no_gradient(recompute: str) -> None:
    settings = ModelSettings(recompute=recompute, recompute_vision=True)  # type: ignore[arg-type]
    pair = make_pair("qwen3_vl", settings)
    made, reference = pair.case("mixed")
    assert compare(pair.model, made.batch, reference).gradient < GRADIENT


def _logits_error(pair: Pair, case: str = "mixed") -> float:
    made, reference = pair.case(case)
    return compare(pair.model, made.batch, reference).logits


def test_zeroed_deepstack_is_noticed() -> None:
    pair = make_pair("qwen3_vl")
    with torch.no_grad():
        for merger in pair.model.vision_model.deepstack_mergers:
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
    assert _logits_error(pair) > 100 * LOGITS


def test_deepstack_at_the_wrong_layers_is_noticed() -> None:
    pair = make_pair("qwen3_vl")
    for layer in pair.model.language_model.decoder.layers:
        layer.deepstack_level = None if layer.layer_number == 1 else layer.layer_number - 2
    assert _logits_error(pair) > 100 * LOGITS


def test_swapped_mrope_sections_are_noticed() -> None:
    pair = make_pair("qwen3_vl")
    text = pair.architecture.text
    pair.model.language_model.rotary_pos_emb = MultimodalRope(
        text.kv_channels, text.rotary_base, text.mrope_section, interleaved=False
    )
    assert _logits_error(pair) > 100 * LOGITS


def test_wrong_vision_activation_is_noticed() -> None:
    pair = make_pair("qwen3_vl")
    for layer in pair.model.vision_model.layers:
        layer.mlp.activation_func = torch.nn.functional.silu
    assert _logits_error(pair) > 100 * LOGITS


def test_sigmoid_router_is_noticed() -> None:
    pair = make_pair("qwen3_vl_moe")
    for layer in pair.model.language_model.decoder.layers:
        if layer.is_moe_layer:
            layer.mlp.router.score_function = "sigmoid"
    assert _logits_error(pair) > 100 * LOGITS


def test_missing_position_table_is_noticed() -> None:
    pair = make_pair("qwen3_vl")
    vision = dataclasses.replace(pair.architecture.vision, num_position_embeddings=None)
    pair.model.vision_model.vision = vision
    made, reference = pair.case("image")
    with torch.no_grad():
        logits = pair.model(dataclasses.replace(made.batch, labels=None))
    assert (logits - reference.logits).abs().max() > 100 * LOGITS * reference.logits.abs().max()
