# SPDX-License-Identifier: Apache-2.0
"""AdamW in one launch against torch's in fp32, whose moments are rounded to 16 bits after every step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models.common.kernels import adamw
from models.common.kernels.adamw import (
    AdamW,
    HalvedWeight,
    WholeWeight,
    adamw_step,
    addresses_of,
    plan_launches,
)

SIZES = ((3, 5), (8,), (40, 32), (1,), (0, 4), (33,))
GROUP = AdamW(0.02, 0.9, 0.95, 1e-8, 0.1, 1, True)
NUM_STEPS = 4


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor has several, and the last of them an end inside a block."""
    monkeypatch.setattr(adamw, "CHUNK", 512)
    monkeypatch.setattr(adamw, "BLOCK", 128)


def zeros_between(device: torch.device, dtype: torch.dtype, distance: int) -> list[Tensor]:
    """Views of SIZES into one buffer, `distance` elements apart: from 1 on, some begin where no vector does."""
    total = sum(torch.Size(size).numel() + distance for size in SIZES)
    buffer, found, place = torch.zeros(total, dtype=dtype, device=device), [], 0
    for size in SIZES:
        count = torch.Size(size).numel()
        found.append(buffer[place : place + count].view(size))
        place += count + distance
    return found


def make_weights(
    device: torch.device, distance: int = 0, gradient: torch.dtype = torch.float32
) -> list[HalvedWeight]:
    bf16 = torch.bfloat16
    columns = [zeros_between(device, dtype, distance) for dtype in (bf16, gradient, bf16, bf16, torch.int16)]
    return drawn([HalvedWeight(*tensors) for tensors in zip(*columns, strict=True)])


def make_whole_weights(
    device: torch.device, distance: int, gradient: torch.dtype, model: torch.dtype
) -> list[WholeWeight]:
    fp32 = torch.float32
    columns = [zeros_between(device, dtype, distance) for dtype in (fp32, gradient, fp32, fp32)]
    last = columns[0] if model is fp32 else zeros_between(device, model, distance)
    return drawn([WholeWeight(*tensors) for tensors in zip(*columns, last, strict=True)])


def drawn[Weights: list[Any]](weights: Weights) -> Weights:
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.weight.copy_(torch.randn(weight.weight.shape, generator=generator))
    return weights


def exact(weight: HalvedWeight) -> Tensor:
    """The fp32 weight of both halves, by numbers instead of bits: the lower one is signed, in units of 2^-16."""
    bits = weight.weight.view(torch.int16).to(torch.int64) * 2**16 + weight.remainder.to(torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def draw_gradients(weights: Sequence[HalvedWeight | WholeWeight], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.gradient.copy_(torch.randn(weight.gradient.shape, generator=generator) * 0.1)


def by_torch(weights: Sequence[HalvedWeight | WholeWeight], group: AdamW) -> tuple[list[Tensor], Any]:
    parameters = [weight.weight.float().requires_grad_() for weight in weights]
    return parameters, torch.optim.AdamW(
        parameters, group.lr, (group.beta1, group.beta2), group.eps, group.weight_decay, foreach=False
    )


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [0, 1, 8])
def test_steps_equal_torch(device: torch.device, distance: int, gradient: torch.dtype) -> None:
    weights = make_weights(device, distance, gradient)
    parameters, reference = by_torch(weights, GROUP)
    rounding = 2**-8 if device.type == "cuda" else 2**-7  # Triton's interpreter cuts off
    launches = plan_launches(weights)
    for step in range(1, NUM_STEPS + 1):
        draw_gradients(weights, step)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.grad = weight.gradient.float()
        reference.step()
        for launch in launches:
            adamw_step(launch, GROUP._replace(step=step))
        for parameter, weight in zip(parameters, weights, strict=True):
            state = reference.state[parameter]
            for name, found in (("exp_avg", weight.first_moment), ("exp_avg_sq", weight.second_moment)):
                torch.testing.assert_close(found.float(), state[name], rtol=rounding, atol=1e-8)
                state[name].copy_(found)  # rounded, as the next step finds them
            torch.testing.assert_close(exact(weight), parameter.detach(), rtol=1e-6, atol=1e-7)
            nearest = exact(weight).bfloat16()  # in the middle of two the even one, where ours is the larger
            off = [(weight.weight.float() - exact(weight)).abs(), (nearest.float() - exact(weight)).abs()]
            assert torch.equal(*off)
            parameter.data.copy_(exact(weight))


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "distance", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(8, marks=pytest.mark.slow)]
)
def test_whole_steps_equal_torch(
    device: torch.device, distance: int, gradient: torch.dtype, model: torch.dtype
) -> None:
    weights = make_whole_weights(device, distance, gradient, model)
    parameters, reference = by_torch(weights, GROUP)
    launches = plan_launches(weights)
    for step in range(1, NUM_STEPS + 1):
        draw_gradients(weights, step)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.grad = 0.5 * weight.gradient.float()
        reference.step()
        for launch in launches:
            adamw_step(launch, GROUP._replace(step=step, gradient_scale=0.5))
    for parameter, weight in zip(parameters, weights, strict=True):
        state = reference.state[parameter]
        for name, found in (("exp_avg", weight.first_moment), ("exp_avg_sq", weight.second_moment)):
            torch.testing.assert_close(found, state[name], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(weight.weight, parameter.detach(), rtol=1e-5, atol=1e-6)
        if device.type == "cuda" or model is not torch.bfloat16:  # which Triton's interpreter cuts off
            assert torch.equal(weight.model_weight, weight.weight.to(model))
        torch.testing.assert_close(weight.model_weight.float(), weight.weight, rtol=2**-7, atol=2**-24)


def test_each_kind_of_weight_takes_launches_of_its_own(device: torch.device) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    weights = [
        *make_weights(device),
        *make_weights(device, 1, bf16),
        *make_whole_weights(device, 0, fp32, bf16),
        *make_whole_weights(device, 0, bf16, fp32),
    ]
    kinds = [launch.kind for launch in plan_launches(weights)]
    assert len(set(kinds)) == len(kinds) == 8


def test_neighbours_of_a_weight_stay(device: torch.device) -> None:
    """Moments of ones between the tensors, where a block ends beyond its tensor."""
    columns = [torch.ones(64, dtype=dtype, device=device) for dtype in (torch.bfloat16,) * 4 + (torch.int16,)]
    weight = HalvedWeight(*(column[8:29] for column in columns))
    for launch in plan_launches([weight]):
        adamw_step(launch, GROUP)
    for column in columns:
        assert torch.all(column[:8] == 1)
        assert torch.all(column[29:] == 1)
    assert not torch.any(weight.weight == 1)


def test_without_bias_correction_the_first_step_is_short(device: torch.device) -> None:
    [corrected], [plain] = (make_weights(device)[1:2] for _ in range(2))
    before = exact(plain)
    for weight, is_corrected in ((corrected, True), (plain, False)):
        draw_gradients([weight], 1)
        for launch in plan_launches([weight]):
            adamw_step(launch, GROUP._replace(bias_correction=is_corrected, weight_decay=0.0))
    ratio = (exact(plain) - before) / (exact(corrected) - before)
    assert ratio.cpu().tolist() == pytest.approx([0.1 / 0.05**0.5] * len(ratio), rel=1e-3)


def test_gradients_are_scaled_first(device: torch.device) -> None:
    whole, halved = (make_weights(device) for _ in range(2))
    draw_gradients(whole, 1)
    for weight, other in zip(whole, halved, strict=True):
        other.gradient.copy_(2 * weight.gradient)
    for weights, scale in ((whole, 1.0), (halved, 0.5)):
        for launch in plan_launches(weights):
            adamw_step(launch, GROUP._replace(gradient_scale=scale))
    for weight, other in zip(whole, halved, strict=True):
        for name in ("weight", "first_moment", "second_moment", "remainder"):
            assert torch.equal(getattr(weight, name), getattr(other, name)), name


def test_places_tell_when_a_tensor_moved(device: torch.device) -> None:
    [weight, *_] = weights = make_weights(device)
    before = addresses_of(weights)
    assert addresses_of(weights) == before
    weights[0] = weight._replace(remainder=weight.remainder.clone())
    assert addresses_of(weights) != before
