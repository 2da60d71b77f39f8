# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from models.common.kernels.swiglu import (
    swiglu_backward,
    swiglu_forward,
    weighted_swiglu_backward,
    weighted_swiglu_forward,
)


@pytest.mark.parametrize(
    ("rows", "half", "width"), [(5, 8, 8), (3, 1030, 1032), (2, 3, 8), (1, 2048, 2048), (0, 4, 4)]
)
def test_values_and_gradients_equal_plain_torch(
    device: torch.device, rows: int, half: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    joined = (torch.randn(rows, 2 * half, generator=generator) * 3).to(device).requires_grad_()
    gradient = torch.randn(rows, width, generator=generator).to(device)
    gate, up = joined.chunk(2, dim=-1)
    plain = F.pad(F.silu(gate) * up, (0, width - half))
    torch.testing.assert_close(swiglu_forward(joined.detach(), width), plain.detach())
    [expected] = torch.autograd.grad(plain, joined, gradient)
    torch.testing.assert_close(swiglu_backward(gradient, joined.detach()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "half", "width"), [(5, 8, 8), (3, 1030, 1032), (2, 3, 8), (0, 4, 4)])
def test_rows_are_weighted_with_one_rounding(
    device: torch.device, rows: int, half: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    joined = (torch.randn(rows, 2 * half, generator=generator) * 3).to(device, dtype)
    gradient = torch.randn(rows, width, generator=generator).to(device, dtype)
    row_weights = torch.rand(rows, generator=generator).to(device).requires_grad_()
    exact = joined.float().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    plain = F.pad(F.silu(gate) * up * row_weights[:, None], (0, width - half))
    # One unit in the last place may hang on the order of fp32 operations.
    limits = {"rtol": 8e-3, "atol": 1e-6} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    found = weighted_swiglu_forward(joined, row_weights.detach(), width)
    torch.testing.assert_close(found, plain.detach().to(dtype), **limits)
    expected, d_row_weights = torch.autograd.grad(plain, (exact, row_weights), gradient.float())
    d_joined, found = weighted_swiglu_backward(gradient, joined, row_weights.detach())
    torch.testing.assert_close(d_joined, expected.to(dtype), **limits)
    torch.testing.assert_close(found, d_row_weights, rtol=1e-5, atol=1e-4)
