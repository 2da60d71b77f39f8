# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from models.common.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(7, 2, 40), (33, 1, 64), (1, 1, 3), (16, 10), (0, 1, 8)])
def test_values_and_gradients_equal_plain_torch(device: torch.device, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(shape, generator=generator).to(device).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).to(device).requires_grad_()
    gradients = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    ours = rms_norm(states, weight, 1e-6)
    plain = (torch.nn.functional.rms_norm(states, shape[-1:], weight, 1e-6), states.view_as(states))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (states, weight), gradients),
        torch.autograd.grad(plain, (states, weight), gradients),
        atol=1e-4,
        rtol=1e-5,
    )


def test_residual_gradient_alone_passes_through(device: torch.device) -> None:
    states = torch.randn(3, 1, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    _, residual = rms_norm(states, weight, 1e-6)
    (residual * 2).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, torch.full_like(states, 2.0))
