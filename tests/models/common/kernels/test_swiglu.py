# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from models.common.kernels.swiglu import swiglu_backward, swiglu_forward


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
