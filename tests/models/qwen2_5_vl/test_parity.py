# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL against transformers: logits, loss and the gradient of every parameter, and breaks that must show."""

import dataclasses

import pytest

from models.common.rope import MultimodalRope
from models.parity.cases import CASES, pack
from models.parity.compare import compare
from models.parity.single import Pair, make_pair

pytestmark = pytest.mark.usefixtures("single_process")

# Worst measured: logits 1.7e-6, loss 8e-7, gradients 4e-6. A swapped section or a missing window is above 1e-2.
LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-3


@pytest.mark.parametrize("case", CASES)
def test_model_equals_transformers(case: str) -> None:
    pair = make_pair("qwen2_5_vl")
    made, reference = pair.case(case)
    result = compare(pair.model, made.batch, reference)
    assert result.logits < LOGITS
    assert result.loss < LOSS
    assert result.gradient < GRADIENT, result.worst
    assert result.num_gradients == len(pair.rules)


def test_packed_row_equals_padded_rows() -> None:
    pair = make_pair("qwen2_5_vl")
    made, reference = pair.case("mixed")
    losses = pair.model(pack(made.batch))
    assert losses.sum().item() == pytest.approx(reference.token_losses.sum().item(), rel=1e-6)


def _logits_error(pair: Pair, case: str = "mixed") -> float:
    made, reference = pair.case(case)
    return compare(pair.model, made.batch, reference).logits


def test_swapped_mrope_sections_are_noticed() -> None:
    pair = make_pair("qwen2_5_vl")
    text = pair.architecture.text
    pair.model.language_model.rotary_pos_emb = MultimodalRope(
        text.kv_channels, text.rotary_base, (2, 1, 1), interleaved=False
    )
    assert _logits_error(pair) > 100 * LOGITS


def test_windows_switched_off_are_noticed() -> None:
    pair = make_pair("qwen2_5_vl")
    vision = pair.architecture.vision
    pair.model.vision_model.vision = dataclasses.replace(vision, fullatt_block_indexes=tuple(range(5)))
    assert _logits_error(pair, "images") > 100 * LOGITS


def test_patches_left_in_reading_order_are_noticed() -> None:
    pair = make_pair("qwen2_5_vl")
    pair.model.vision_model.vision = dataclasses.replace(pair.architecture.vision, window_size=None)
    assert _logits_error(pair, "images") > 100 * LOGITS
