# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from models.common.kernels.norm import residual_norm


@pytest.mark.parametrize("is_centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shape", [(7, 2, 40), (33, 1, 64), (1, 1, 3), (16, 10), (0, 1, 8)])
def test_values_and_gradients_equal_plain_torch(
    device: torch.device, shape: tuple[int, ...], *, is_centred: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(shape, generator=generator) + 0.7).to(device).requires_grad_()
    weight, bias = (torch.randn(shape[-1], generator=generator).to(device).requires_grad_() for _ in range(2))
    gradients = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    inputs = (states, weight, bias) if is_centred else (states, weight)
    ours = residual_norm(states, weight, bias if is_centred else None, 1e-6)
    normed = (
        F.layer_norm(states, shape[-1:], weight, bias, 1e-6)
        if is_centred
        else F.rms_norm(states, shape[-1:], weight, 1e-6)
    )
    plain = (normed, states.view_as(states))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, gradients),
        torch.autograd.grad(plain, inputs, gradients),
        atol=1e-4,
        rtol=1e-5,
    )


@pytest.mark.parametrize("has_bias", [False, True])
def test_residual_gradient_alone_passes_through(device: torch.device, *, has_bias: bool) -> None:
    states = torch.randn(3, 1, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    bias = torch.zeros(8, device=device, requires_grad=True) if has_bias else None
    _, residual = residual_norm(states, weight, bias, 1e-6)
    (residual * 2).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, torch.full_like(states, 2.0))
