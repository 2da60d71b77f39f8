# SPDX-License-Identifier: Apache-2.0
"""Published sizes built on the meta device: every parameter counted, against arithmetic on the published tables."""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from models.common.settings import ModelSettings
from models.contract.families import PUBLISHED, family_part, published_architecture

pytestmark = pytest.mark.usefixtures("single_process")


class Size(NamedTuple):
    """A row of the table. Heads are 128 wide; an expert model has 128 experts, 8 of them active."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    """Of a dense layer, or of one expert."""
    vocab: int
    tied: bool
    vision: str
    billions: tuple[float, ...]
    """As published: decoder with output layer, vision with mergers; for expert models also the active decoder."""


SIZES = {
    "qwen2_5_vl_3b": Size(36, 2048, 16, 2, 11008, 151936, True, "windowed", (3.09, 0.67)),
    "qwen2_5_vl_7b": Size(28, 3584, 28, 4, 18944, 152064, False, "windowed", (7.62, 0.68)),
    "qwen2_5_vl_32b": Size(64, 5120, 40, 8, 27648, 152064, False, "windowed wide", (32.8, 0.69)),
    "qwen2_5_vl_72b": Size(80, 8192, 64, 8, 29568, 152064, False, "windowed wide", (72.7, 0.70)),
    "qwen3_vl_2b": Size(28, 2048, 16, 8, 6144, 151936, True, "small", (1.72, 0.41)),
    "qwen3_vl_4b": Size(36, 2560, 32, 8, 9728, 151936, True, "small", (4.02, 0.42)),
    "qwen3_vl_8b": Size(36, 4096, 32, 8, 12288, 151936, False, "large", (8.19, 0.58)),
    "qwen3_vl_32b": Size(64, 5120, 64, 8, 25600, 151936, False, "large", (32.76, 0.60)),
    "qwen3_vl_30b_a3b": Size(48, 2048, 32, 4, 768, 151936, False, "large", (30.53, 0.54, 3.35)),
    "qwen3_vl_235b_a22b": Size(94, 4096, 64, 4, 1536, 151936, False, "large", (235.09, 0.58, 22.2)),
    "qwen3_omni_30b_a3b": Size(48, 2048, 32, 4, 768, 152064, False, "large", (30.53, 0.54, 3.35)),
}
EXPERTS, ACTIVE, HEAD = 128, 8, 128


def decoder_counts(name: str, size: Size) -> tuple[int, int]:
    """All and active parameters: embedding, norms, attention, gated MLPs; biases of q, k, v in 2.5, norms in 3."""
    h, query, key = size.hidden, size.heads * HEAD, size.groups * HEAD
    attention = h * (query + 2 * key) + query * h
    attention += query + 2 * key if name.startswith("qwen2_5") else 2 * HEAD
    mlp = 3 * h * size.ffn
    ends = size.vocab * h * (1 if size.tied else 2) + h
    layer = attention + 2 * h
    if not is_moe(name):
        return (ends + size.layers * (layer + mlp),) * 2
    layer += EXPERTS * h  # the router
    return tuple(ends + size.layers * (layer + count * mlp) for count in (EXPERTS, ACTIVE))  # type: ignore[return-value]


def vision_count(size: Size) -> int:
    """Patch embedding, layers, mergers."""
    out = size.hidden
    if size.vision.startswith("windowed"):
        h, f = 1280, 3456 if size.vision.endswith("wide") else 3420
        layer = 4 * h * h + 4 * h + 3 * h * f + 2 * f + h + 2 * h
        merger = (4 * h) ** 2 + 4 * h + 4 * h * out + out
        return 3 * 2 * 14**2 * h + 32 * layer + h + merger
    depth, h, f = (24, 1024, 4096) if size.vision == "small" else (27, 1152, 4304)
    layer = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h
    merger = (4 * h) ** 2 + 4 * h + 4 * h * out + out
    return (3 * 2 * 16**2 + 1) * h + 48**2 * h + depth * layer + (merger + 2 * h) + 3 * (merger + 2 * 4 * h)


def is_moe(name: str) -> bool:
    return name.endswith(("a3b", "a22b"))


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


def test_every_published_size_is_in_the_table() -> None:
    assert set(SIZES) == {file.stem for file in PUBLISHED.glob("*.json")}


@pytest.mark.parametrize("name", SIZES)
def test_table_gives_the_published_billions(name: str) -> None:
    """The arithmetic itself, against what model cards say (two digits)."""
    size = SIZES[name]
    total, active = decoder_counts(name, size)
    for count, billions in zip((total, vision_count(size), active), size.billions, strict=False):
        assert count / 1e9 == pytest.approx(billions, abs=0.05 if billions > 20 else 0.006)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if size.billions[0] > 20 else ())
    for name, size in SIZES.items() if not is_moe(name)
])  # fmt: skip
def test_dense_sizes_have_every_parameter(name: str) -> None:
    counts = count_parameters(name)
    assert counts["language_model"] == decoder_counts(name, SIZES[name])[0]
    assert counts["vision_model"] == vision_count(SIZES[name])


@pytest.mark.parametrize("name", [name for name in SIZES if is_moe(name)])
def test_expert_sizes_have_every_parameter(name: str) -> None:
    moe, size = published_architecture(name).text.moe, SIZES[name]
    assert moe is not None
    assert (moe.num_experts, moe.topk) == (EXPERTS, ACTIVE)
    one, two = (count_parameters(name, num_layers=layers) for layers in (1, 2))
    with_three = two["language_model"] - one["language_model"]
    ends = one["language_model"] - with_three
    one_more = 3 * size.hidden * size.ffn + size.hidden  # an expert and its row of the router
    layer = with_three + (EXPERTS - 3) * one_more
    assert ends + size.layers * layer == decoder_counts(name, size)[0]
    active = layer - (EXPERTS - ACTIVE) * 3 * size.hidden * size.ffn
    assert ends + size.layers * active == decoder_counts(name, size)[1]
    assert one["vision_model"] == vision_count(size)


def test_audio_tower_has_its_parameters() -> None:
    counts = count_parameters("qwen3_omni_30b_a3b", num_layers=1)
    # 32 layers of 4 d^2 + 2 d f, three convolutions, two projections: d 1280, f 5120, 480 channels
    layers = 32 * (4 * 1280**2 + 2 * 1280 * 5120 + 4 * 1280 + 5120 + 1280 + 4 * 1280)
    convolutions = 9 * 480 + 2 * 9 * 480**2 + 3 * 480 + 480 * 16 * 1280
    projections = 1280**2 + 1280 + 1280 * 2048 + 2048 + 2 * 1280
    assert counts["audio_model"] == layers + convolutions + projections
