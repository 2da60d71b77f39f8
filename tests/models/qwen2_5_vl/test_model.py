# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL beside being right: names, number formats, recompute over windows, refusals."""

import dataclasses

import pytest
import torch

from models.common.settings import ModelSettings
from models.contract.errors import ShapeError
from models.parity.compare import compare
from models.parity.single import make_pair

pytestmark = pytest.mark.usefixtures("single_process")


def test_sharded_keys_are_the_contracts() -> None:
    pair = make_pair("qwen2_5_vl")
    keys = {
        value.key for value in pair.model.sharded_state_dict().values() if "_extra_state" not in value.key
    }
    assert keys == {rule.key for rule in pair.rules}
    assert not any("deepstack" in key or "position_embedding" in key for key in keys)


def test_recompute_of_windowed_layers_changes_no_gradient() -> None:
    pair = make_pair("qwen2_5_vl", ModelSettings(recompute="full", recompute_vision=True))
    made, reference = pair.case("mixed")
    assert compare(pair.model, made.batch, reference).gradient < 1e-3  # measured 4e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_runs_with_a_scaled_loss(dtype: torch.dtype, limit: float) -> None:
    pair = make_pair("qwen2_5_vl", ModelSettings(dtype=dtype))
    made, reference = pair.case("mixed")
    losses = pair.model(made.batch)
    (1024.0 * losses.sum() / made.batch.num_supervised_tokens).backward()
    assert losses.dtype == torch.float32
    # measured: bf16 0.5%, fp16 0.05% of the sum
    assert losses.sum().item() == pytest.approx(reference.token_losses.sum().item(), rel=limit)
    weight = pair.model.language_model.output_layer.weight.grad.float() / 1024
    wanted = reference.gradients["language_model.output_layer.weight"]
    assert ((weight - wanted).norm() / wanted.norm()).item() < 10 * limit


def test_grid_that_does_not_merge_is_refused() -> None:
    pair = make_pair("qwen2_5_vl")
    made, _ = pair.case("image")
    odd = dataclasses.replace(made.batch, grid_thw=torch.tensor([[1, 3, 8]]))
    with pytest.raises(ShapeError, match="impossible grid"):
        pair.model(odd)


def test_sample_with_too_many_placeholders_is_named() -> None:
    pair = make_pair("qwen2_5_vl")
    made, _ = pair.case("images")
    positions = made.batch.vision_positions
    assert positions is not None
    more = torch.cat([positions, positions[-1:] + 1])
    broken = dataclasses.replace(made.batch, vision_positions=more, sample_keys=("a", "b"))
    with pytest.raises(ShapeError, match=r"sample 1 \(b\)"):
        pair.model(broken)
