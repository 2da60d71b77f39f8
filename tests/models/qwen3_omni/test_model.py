# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker beside being right: names, towers without media, number formats, refusals."""

import dataclasses

import pytest
import torch

from models.common.settings import ModelSettings
from models.contract.errors import ShapeError
from models.parity.single import make_pair

pytestmark = pytest.mark.usefixtures("single_process")


def test_sharded_keys_are_the_contracts() -> None:
    pair = make_pair("qwen3_omni")
    keys = {
        value.key for value in pair.model.sharded_state_dict().values() if "_extra_state" not in value.key
    }
    assert keys == {rule.key for rule in pair.rules}


@pytest.mark.parametrize(("case", "idle"), [("text", ("vision_model.", "audio_model.")), ("image", ("audio_model.",)),
                                            ("audio", ("vision_model.",))])  # fmt: skip
def test_tower_without_media_gets_zero_gradients(case: str, idle: tuple[str, ...]) -> None:
    pair = make_pair("qwen3_omni")
    made, _ = pair.case(case)
    pair.model(made.batch).sum().backward()
    gradients = {name: parameter.grad for name, parameter in pair.model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert not any(gradients[name].any() for name in gradients if name.startswith(idle))  # type: ignore[union-attr]
    busy = [
        name
        for name in gradients
        if name.startswith(("vision_model.", "audio_model.")) and not name.startswith(idle)
    ]
    assert all(gradients[name].any() for name in busy)  # type: ignore[union-attr]


def test_clip_without_frames_is_refused_by_number() -> None:
    pair = make_pair("qwen3_omni")
    made, _ = pair.case("audios")
    lengths = made.batch.audio_lengths
    assert lengths is not None
    empty = dataclasses.replace(made.batch, audio_lengths=torch.cat([lengths, lengths.new_zeros(1)]))
    with pytest.raises(ShapeError, match=f"clip {len(lengths)} of the micro-batch"):
        pair.model(empty)


def test_features_of_another_shape_are_refused() -> None:
    pair = make_pair("qwen3_omni")
    made, _ = pair.case("audio")
    features = made.batch.input_features
    assert features is not None
    for wrong in (features[:-1], features[:, :-3], features.T):
        with pytest.raises(ShapeError, match="mel features of another shape"):
            pair.model(dataclasses.replace(made.batch, input_features=wrong))


def test_more_placeholders_than_audio_tokens_names_the_samples() -> None:
    pair = make_pair("qwen3_omni")
    made, _ = pair.case("audios")
    positions = made.batch.audio_positions
    assert positions is not None
    more = dataclasses.replace(made.batch, audio_positions=torch.cat([positions, positions[-1:] + 1]))
    with pytest.raises(ShapeError, match="audio tokens and placeholders") as error:
        pair.model(more)
    assert "sample 0" in str(error.value)
    assert "sample 1" in str(error.value)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision_runs(dtype: torch.dtype, limit: float) -> None:
    pair = make_pair("qwen3_omni", ModelSettings(dtype=dtype, moe_aux_loss_coeff=0.0))
    made, reference = pair.case("audio and vision")
    losses = pair.model(made.batch)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.sum().item() == pytest.approx(reference.token_losses.sum().item(), rel=limit)
