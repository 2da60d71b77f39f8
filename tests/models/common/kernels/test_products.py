# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch

from models.common.kernels.products import (
    bias_gradient,
    linear,
    linear_onto,
    vector_gradients,
    weight_gradient,
)


def parameter(device: torch.device, *shape: int, dtype: torch.dtype, main: torch.dtype | None) -> Any:
    """A parameter whose main gradient, if it has one, is 1 everywhere."""
    found: Any = torch.nn.Parameter(torch.randn(shape).to(device, dtype))
    if main is not None:
        found.main_grad = torch.ones(shape, dtype=main, device=device)
        found.grad_added_to_main_grad = False
    return found


@pytest.mark.parametrize(
    ("dtype", "main"),
    [
        (torch.float32, None),
        (torch.float32, torch.float32),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("width", [16, 24], ids=["", "padded"])
def test_gradients_reach_the_main_gradient_or_autograd(
    device: torch.device, dtype: torch.dtype, main: torch.dtype | None, width: int
) -> None:
    torch.manual_seed(0)
    weight, bias = (parameter(device, *shape, dtype=dtype, main=main) for shape in ((24, 16), (24,)))
    wide = torch.randn(40, 24).to(device, dtype)
    rows, d_out = wide[:, :16], torch.randn(40, 24).to(device, dtype)  # rows have a stride of their own
    d_weight = weight_gradient(weight, d_out, wide[:, :width])  # what lies behind is no matter
    [d_bias] = vector_gradients([bias], [bias_gradient(bias, d_out)])
    exact = (d_out.double().t() @ rows.double(), d_out.double().sum(dim=0))
    limit = 1e-5 if torch.float32 in (main, dtype) and main != torch.bfloat16 else 2e-2
    for owner, returned, expected in zip((weight, bias), (d_weight, d_bias), exact, strict=True):
        assert returned is not None
        found = returned if main is None else owner.main_grad - 1
        scale = float(expected.abs().max())
        if dtype is torch.bfloat16 and main is torch.float32 and device.type == "cpu":
            limit = 2e-2  # the CPU has no product that puts out another format
        assert float((found.double() - expected).abs().max()) / scale < limit
        assert returned.shape == owner.shape
        if main is not None:
            assert owner.grad_added_to_main_grad


def test_frozen_and_missing_parameters_get_nothing(device: torch.device) -> None:
    weight = parameter(device, 8, 8, dtype=torch.float32, main=torch.float32).requires_grad_(False)
    ones = torch.ones(4, 8, device=device)
    assert weight_gradient(weight, ones, ones) is None
    assert bias_gradient(None, ones) is None
    assert vector_gradients([None, weight], [None, ones]) == [None, None]
    assert bool((weight.main_grad == 1).all())


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_equal_plain_torch(device: torch.device, *, has_bias: bool) -> None:
    torch.manual_seed(0)
    rows, weight, residual = (torch.randn(shape, device=device) for shape in ((10, 16), (24, 16), (2, 5, 24)))
    bias = torch.randn(24, device=device) if has_bias else None
    plain = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(linear(rows, weight, bias), plain)
    torch.testing.assert_close(linear_onto(residual, rows, weight, bias), residual + plain.view(2, 5, 24))
    turned = residual.transpose(0, 1)
    torch.testing.assert_close(linear_onto(turned, rows, weight, bias), turned + plain.view(5, 2, 24))
