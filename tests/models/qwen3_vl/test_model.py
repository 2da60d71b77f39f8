# SPDX-License-Identifier: Apache-2.0
"""What a model does beside being right: names, gradients without media, freezing, and refusals."""

import dataclasses

import pytest
import torch

from models.common.settings import ModelSettings
from models.contract.errors import ShapeError
from models.parity.single import make_pair

pytestmark = pytest.mark.usefixtures("single_process")


def test_sharded_keys_are_the_contracts() -> None:
    pair = make_pair("qwen3_vl_moe")
    keys = {
        value.key
        for value in pair.model.sharded_state_dict().values()
        if not value.key.endswith("_extra_state")
    }
    assert keys == {rule.key for rule in pair.rules}


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        ("language", {"vision", "projector"}),
        ("vision", {"language", "projector"}),
        ("projector", {"language", "vision"}),
    ],
)
@pytest.mark.parametrize("case", ["mixed", "text"])
def test_frozen_group_gets_no_gradient_and_the_others_do(frozen: str, trained: set[str], case: str) -> None:
    pair = make_pair("qwen3_vl", ModelSettings(freeze=(frozen,)))  # type: ignore[arg-type]
    made, _ = pair.case(case)
    pair.model(made.batch).sum().backward()
    named = dict(pair.model.named_parameters())
    groups = {
        "language": [key for key in named if key.startswith("language_model.")],
        "projector": [key for key in named if ".merger." in key or ".deepstack_mergers." in key],
    }
    groups["vision"] = [key for key in named if key not in groups["language"] + groups["projector"]]
    assert all(named[key].grad is None for key in groups[frozen])
    for group in trained:
        assert all(named[key].grad is not None for key in groups[group])


def test_text_only_gives_vision_zero_gradients() -> None:
    pair = make_pair("qwen3_vl")
    made, _ = pair.case("text")
    pair.model(made.batch).sum().backward()
    vision = [p.grad for key, p in pair.model.named_parameters() if key.startswith("vision_model.")]
    assert all(gradient is not None and not gradient.any() for gradient in vision)


def test_ignored_labels_have_no_loss() -> None:
    pair = make_pair("qwen3_vl")
    made, _ = pair.case("image")
    losses = pair.model(made.batch)
    assert losses.dtype == torch.float32
    assert torch.equal(losses != 0, made.batch.labels != -100)


def test_placeholder_without_media_is_refused() -> None:
    pair = make_pair("qwen3_vl")
    made, _ = pair.case("image")
    assert made.batch.vision_positions is not None
    short = dataclasses.replace(made.batch, vision_positions=made.batch.vision_positions[:-1])
    with pytest.raises(ShapeError, match="vision tokens and placeholders do not match"):
        pair.model(short)


def test_bf16_model_runs_and_reports_fp32_losses() -> None:
    pair = make_pair("qwen3_vl", ModelSettings(dtype=torch.bfloat16))
    made, reference = pair.case("mixed")
    losses = pair.model(made.batch)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    # bf16 keeps 8 bits: measured 0.6% of the sum
    assert losses.sum().item() == pytest.approx(reference.token_losses.sum().item(), rel=0.02)
