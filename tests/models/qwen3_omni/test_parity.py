# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker against transformers: logits, loss, every gradient, and breaks that must show."""

import pytest
import torch

from models.parity.cases import AUDIO_CASES, pack
from models.parity.compare import compare
from models.parity.single import make_pair

pytestmark = pytest.mark.usefixtures("single_process")

LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-3


@pytest.mark.parametrize("case", ["text", "mixed", *AUDIO_CASES])
def test_model_equals_transformers(case: str) -> None:
    pair = make_pair("qwen3_omni")
    made, reference = pair.case(case)
    result = compare(pair.model, made.batch, reference)
    assert result.logits < LOGITS
    assert result.loss < LOSS
    assert result.gradient < GRADIENT, result.worst
    assert result.num_gradients == len(pair.rules)


def test_packed_row_equals_padded_rows() -> None:
    pair = make_pair("qwen3_omni")
    made, reference = pair.case("audio and vision")
    losses = pair.model(pack(made.batch))
    assert losses.sum().item() == pytest.approx(reference.token_losses.sum().item(), rel=1e-6)


def test_missing_audio_positions_are_noticed() -> None:
    pair = make_pair("qwen3_omni")
    made, reference = pair.case("audio")
    pair.model.audio_model.positions = torch.zeros_like(pair.model.audio_model.positions)
    assert compare(pair.model, made.batch, reference).logits > 100 * LOGITS
