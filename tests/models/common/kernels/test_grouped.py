# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows against a loop over the groups."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models.common.kernels.grouped import (
    as_one,
    grouped_linear,
    grouped_linear_backward,
    grouped_weight_gradients,
)
from tests.models.common.interpreted import allow_loaded_bounds

allow_loaded_bounds()

SIZES = {
    "uneven": (3, 0, 70, 1, 0, 129), "one group": (65,), "all in one": (0, 40, 0), "first and last empty": (0, 5, 9, 0),
    "no rows": (0, 0), "more than one block": (64, 128, 200),
}  # fmt: skip
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def ends_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(device, torch.int32)


def drawn(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def weights_of(
    count: int,
    *shape: int,
    device: torch.device,
    dtype: torch.dtype,
    main: torch.dtype | None,
    is_apart: bool,
) -> list[Any]:
    """Parameters; main gradients, if they have them, are 1 everywhere, in one buffer or each by itself."""
    weights: list[Any] = [
        torch.nn.Parameter(drawn(*shape, device=device, dtype=dtype, seed=index)) for index in range(count)
    ]
    buffer = torch.ones(count, shape[0] * shape[1] + 64, dtype=main, device=device)
    for index, weight in enumerate(weights):
        if main is not None:
            place = buffer[index, : weight.numel()].view(shape)
            weight.main_grad = place.clone() if is_apart else place
            weight.grad_added_to_main_grad = False
    return weights


def assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    if exact.numel():
        assert float((found.double() - exact).abs().max()) <= limit * float(exact.abs().max().clamp(min=1e-9))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_products_equal_a_loop(device: torch.device, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    if device.type == "cuda" and dtype is torch.float32:
        pytest.skip("the kernel is one for bf16")
    ends = ends_of(sizes, device)
    rows, d_out = (drawn(sum(sizes), width, device=device, dtype=dtype, seed=width) for width in (24, 40))
    weights = drawn(len(sizes), 40, 24, device=device, dtype=dtype)
    parts = zip(rows.double().split(sizes), d_out.double().split(sizes), weights.double(), strict=True)
    exact = [(part @ weight.t(), d_part @ weight) for part, d_part, weight in parts]
    assert_near(grouped_linear(rows, weights, ends), torch.cat([out for out, _ in exact]), LIMITS[dtype])
    backward = grouped_linear_backward(d_out, weights, ends)
    assert_near(backward, torch.cat([d_rows for _, d_rows in exact]), LIMITS[dtype])


@pytest.mark.parametrize(
    ("dtype", "main", "is_apart"),
    [
        (torch.float32, None, False),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, None, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("sizes", "width"), [
    *((sizes, 24) for sizes in SIZES.values()), (SIZES["uneven"], 32),
], ids=[*SIZES, "padded rows"])  # fmt: skip
def test_weight_gradients_equal_a_loop(
    device: torch.device,
    sizes: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    main: torch.dtype | None,
    is_apart: bool,
) -> None:
    ends = ends_of(sizes, device)
    weights = weights_of(len(sizes), 136, 24, device=device, dtype=dtype, main=main, is_apart=is_apart)
    wide, d_out = (drawn(sum(sizes), columns, device=device, dtype=dtype) for columns in (width, 136))
    parts = zip(wide[:, :24].double().split(sizes), d_out.double().split(sizes), strict=True)
    exact = [d_part.t() @ part for part, d_part in parts]
    for times in (1, 2):  # micro-batches
        returned = grouped_weight_gradients(weights, d_out, wide, ends)
        for weight, gradient, expected in zip(weights, returned, exact, strict=True):
            assert gradient.shape == weight.shape
            assert gradient.stride() == weight.stride()  # else autograd copies it
            if main is None:
                assert_near(gradient, expected, LIMITS[dtype])
            else:
                limit = 1e-5 if main is torch.float32 else 2e-2  # nothing is rounded before it is added
                assert_near(weight.main_grad, times * expected + 1, limit)
                assert weight.grad_added_to_main_grad


def test_neighbours_are_seen_as_one_and_others_are_not() -> None:
    buffer = torch.arange(64.0)
    apart = [buffer[start : start + 6].view(2, 3) for start in (2, 10, 18)]
    view = as_one(apart)
    assert view is not None
    assert torch.equal(view, torch.stack(apart))
    assert view.data_ptr() == apart[0].data_ptr()
    single = as_one([torch.ones(2, 3)])
    assert single is not None
    assert single.shape == (1, 2, 3)
    uneven = [buffer[start : start + 6].view(2, 3) for start in (2, 10, 19)]
    overlapping = [buffer[start : start + 6].view(2, 3) for start in (2, 5, 8)]
    turned = [buffer[start : start + 6].view(3, 2).t() for start in (2, 10, 18)]
    for others in (apart[::-1], uneven, overlapping, turned, [torch.ones(2, 3) for _ in range(3)]):
        assert as_one(others) is None
