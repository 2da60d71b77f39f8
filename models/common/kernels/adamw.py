# SPDX-License-Identifier: Apache-2.0
"""AdamW of many weights in one launch, with moments of 16 bits and fp32 weights in two halves.

A weight is bf16; the lower half of its fp32 value is an int16 beside it, and the bf16 one is the nearest to both:
TransformerEngine's format (`store_param_remainders` of its FusedAdam), whose step unpacks moments to fp32 and packs
them again with four launches a tensor. Experts are thousands of tensors: a step waits for the CPU longer than for
memory, which this one reads and writes once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32768
"""Elements of one program, which never belong to two tensors."""
BLOCK = 1024
ALIGNMENT = 16
"""Bytes at whose multiples tensors begin that are read 16 bytes at a time."""
VECTOR = 8
"""Elements of which such tensors have a multiple."""


class Weight(NamedTuple):
    """Tensors of one weight: contiguous, of one size, on one device."""

    weight: Tensor
    """bfloat16."""
    gradient: Tensor
    """float32 or bfloat16."""
    first_moment: Tensor
    """bfloat16."""
    second_moment: Tensor
    """bfloat16."""
    remainder: Tensor
    """int16, the lower half of the fp32 weight."""


class AdamW(NamedTuple):
    """What a step takes of its parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """From 1 on."""
    bias_correction: bool
    gradient_scale: float = 1.0
    """What gradients are multiplied with first."""


class Launch(NamedTuple):
    """Where a launch finds its tensors, on their device."""

    addresses: Tensor
    """[n, 5] int64, in the order of :class:`Weight`."""
    sizes: Tensor
    """[n] int64."""
    chunks: Tensor
    """[c, 2] int32: a tensor, and which of its chunks."""
    gradient_dtype: torch.dtype
    is_aligned: bool


def addresses_of(weights: Sequence[Weight]) -> list[tuple[int, ...]]:
    """Where the tensors lie; as long as this is the same, so are the launches."""
    return [tuple(tensor.data_ptr() for tensor in weight) for weight in weights]


def plan_launches(weights: Sequence[Weight]) -> list[Launch]:
    """Launches that step all of the weights: one for aligned tensors, one for others, of each gradients' dtype."""
    kinds: dict[tuple[torch.dtype, bool], list[Weight]] = {}
    for weight, addresses in zip(weights, addresses_of(weights), strict=True):
        size = weight.weight.numel()
        assert all(tensor.is_contiguous() and tensor.numel() == size for tensor in weight)
        is_aligned = not (size % VECTOR or any(address % ALIGNMENT for address in addresses))
        kinds.setdefault((weight.gradient.dtype, is_aligned), []).append(weight)
    return [_plan(chosen, *kind) for kind, chosen in kinds.items()]


def _plan(weights: Sequence[Weight], gradient_dtype: torch.dtype, is_aligned: bool) -> Launch:
    device = weights[0].weight.device
    sizes = torch.tensor([weight.weight.numel() for weight in weights])
    chunks = torch.tensor([*_chunks(sizes.tolist())], dtype=torch.int32).view(-1, 2)
    return Launch(
        torch.tensor(addresses_of(weights)).to(device), sizes.to(device), chunks.to(device), gradient_dtype,
        is_aligned,
    )  # fmt: skip


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    for index, size in enumerate(sizes):
        yield from ((index, chunk) for chunk in range(-(-size // CHUNK)))


def adamw_step(launch: Launch, group: AdamW) -> None:
    """Step weights and states in place.

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        w = w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)

    in fp32 (Loshchilov and Hutter, 2019, algorithm 2); moments are rounded once they have been used.

    Args:
        launch: From :func:`plan_launches`, of tensors that are still there.
        group: Of all of them.
    """
    if not len(launch.chunks):
        return
    correction1, correction2 = (
        1 - beta**group.step if group.bias_correction else 1.0 for beta in (group.beta1, group.beta2)
    )
    _adamw_step[(len(launch.chunks),)](
        launch.addresses, launch.sizes, launch.chunks,
        group.gradient_scale, group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, correction1,
        correction2,
        **_constants(launch),
    )  # fmt: skip


def _constants(launch: Launch) -> dict[str, Any]:
    return {
        "IS_FP32": launch.gradient_dtype is torch.float32, "IS_ALIGNED": launch.is_aligned,
        "CHUNK": CHUNK, "BLOCK": BLOCK, "VECTOR": VECTOR, "ALIGNMENT": ALIGNMENT, "num_warps": 4,
    }  # fmt: skip


@triton.jit
def _pointer(addresses, tensor, column: tl.constexpr, dtype: tl.constexpr, IS_ALIGNED: tl.constexpr,
             ALIGNMENT: tl.constexpr):  # fmt: skip
    pointer = tl.load(addresses + tensor * 5 + column).to(tl.pointer_type(dtype))  # type: ignore[arg-type]
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, ALIGNMENT)
    return pointer


@triton.jit
def _adamw_step(
    addresses, sizes, chunks, gradient_scale, lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    IS_FP32: tl.constexpr, IS_ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(chunks + tl.program_id(0) * 2).to(tl.int64)
    start = tl.load(chunks + tl.program_id(0) * 2 + 1).to(tl.int64) * CHUNK
    left = tl.load(sizes + tensor) - start
    if IS_ALIGNED:
        left = tl.multiple_of(left, VECTOR)
    weights = _pointer(addresses, tensor, 0, tl.int16, IS_ALIGNED, ALIGNMENT) + start
    gradients = (
        _pointer(addresses, tensor, 1, tl.float32 if IS_FP32 else tl.bfloat16, IS_ALIGNED, ALIGNMENT) + start
    )
    firsts = _pointer(addresses, tensor, 2, tl.bfloat16, IS_ALIGNED, ALIGNMENT) + start
    seconds = _pointer(addresses, tensor, 3, tl.bfloat16, IS_ALIGNED, ALIGNMENT) + start
    remainders = _pointer(addresses, tensor, 4, tl.int16, IS_ALIGNED, ALIGNMENT) + start
    for offset in range(0, CHUNK, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        is_inside = i < left
        g = gradient_scale * tl.load(gradients + i, is_inside, 0.0).to(tl.float32)
        m = tl.load(firsts + i, is_inside, 0.0).to(tl.float32)
        v = tl.load(seconds + i, is_inside, 0.0).to(tl.float32)
        low = tl.load(remainders + i, is_inside, 0)
        high = tl.load(weights + i, is_inside, 0)
        # The upper half was rounded up where the lower one is half a unit of it or more.
        high = tl.where(low < 0, high - 1, high)
        w = ((high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        root = tl.sqrt_rn(tl.div_rn(v, correction2))
        w -= lr * (tl.div_rn(tl.div_rn(m, correction1), root + eps) + weight_decay * w)
        bits = w.to(tl.int32, bitcast=True)
        low = bits.to(tl.int16)
        high = (bits >> 16).to(tl.int16)
        tl.store(weights + i, tl.where(low < 0, high + 1, high), is_inside)
        tl.store(remainders + i, low, is_inside)
        tl.store(firsts + i, m.to(tl.bfloat16), is_inside)
        tl.store(seconds + i, v.to(tl.bfloat16), is_inside)
