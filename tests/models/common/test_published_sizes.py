# SPDX-License-Identifier: Apache-2.0
"""Published sizes built on the meta device: parameter counts against the numbers that are known for them."""

import dataclasses

import pytest
import torch

from models.common.settings import ModelSettings
from models.contract.families import family_part, published_architecture

pytestmark = pytest.mark.usefixtures("single_process")

# Billions: decoder with its output layer, vision tower with mergers. Sources: model cards and config arithmetic.
DENSE = {
    "qwen2_5_vl_3b": (3.09, 0.67),
    "qwen2_5_vl_7b": (7.62, 0.68),
    "qwen2_5_vl_32b": (32.76, 0.69),
    "qwen2_5_vl_72b": (72.71, 0.70),
    "qwen3_vl_4b": (4.02, 0.42),
    "qwen3_vl_8b": (8.19, 0.58),
}
EXPERTS = {
    "qwen3_vl_30b_a3b": (30.53, 3.35, 0.54),
    "qwen3_vl_235b_a22b": (235.09, 22.2, 0.58),
    "qwen3_omni_30b_a3b": (30.53, 3.35, 0.54),
}


def count_parameters(name: str, *, num_layers: int | None = None) -> dict[str, int]:
    """Parameters by tower."""
    architecture = published_architecture(name)
    moe = architecture.text.moe
    if moe is not None:  # three experts stand for all: they are alike, and building each takes long
        text = dataclasses.replace(architecture.text, moe=dataclasses.replace(moe, num_experts=3, topk=2))
        architecture = dataclasses.replace(architecture, text=text)
    settings = ModelSettings(device="meta", num_layers=num_layers)
    with torch.device("meta"):
        model = family_part(architecture.family, "model").build_model(architecture, settings)
    counts: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        tower = key.partition(".")[0]
        counts[tower] = counts.get(tower, 0) + parameter.numel()
    return counts


@pytest.mark.parametrize("name", DENSE)
def test_dense_sizes_have_their_parameters(name: str) -> None:
    counts = count_parameters(name)
    decoder, vision = DENSE[name]
    assert counts["language_model"] / 1e9 == pytest.approx(decoder, abs=0.006)
    assert counts["vision_model"] / 1e9 == pytest.approx(vision, abs=0.006)


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_sizes_have_their_parameters(name: str) -> None:
    architecture = published_architecture(name)
    text, moe = architecture.text, architecture.text.moe
    assert moe is not None
    one, two = (count_parameters(name, num_layers=layers) for layers in (1, 2))
    with_three = two["language_model"] - one["language_model"]
    rest = one["language_model"] - with_three
    expert = 3 * text.hidden_size * moe.ffn_hidden_size
    router = text.hidden_size  # a row for each expert
    layer = with_three + (moe.num_experts - 3) * (expert + router)
    active = layer - (moe.num_experts - moe.topk) * expert
    total, active_total, vision = EXPERTS[name]
    assert (rest + text.num_layers * layer) / 1e9 == pytest.approx(total, abs=0.006)
    assert (rest + text.num_layers * active) / 1e9 == pytest.approx(active_total, abs=0.05)
    assert one["vision_model"] / 1e9 == pytest.approx(vision, abs=0.006)


def test_audio_tower_has_its_parameters() -> None:
    counts = count_parameters("qwen3_omni_30b_a3b", num_layers=1)
    # 32 layers of 4 d^2 + 2 d f, three convolutions, two projections: d 1280, f 5120, 480 channels
    layers = 32 * (4 * 1280**2 + 2 * 1280 * 5120 + 4 * 1280 + 5120 + 1280 + 4 * 1280)
    convolutions = 9 * 480 + 2 * 9 * 480**2 + 3 * 480 + 480 * 16 * 1280
    projections = 1280**2 + 1280 + 1280 * 2048 + 2048 + 2 * 1280
    assert counts["audio_model"] == layers + convolutions + projections
