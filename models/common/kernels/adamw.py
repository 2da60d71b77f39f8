# SPDX-License-Identifier: Apache-2.0
"""AdamW of many weights in one launch, which reads and writes memory once.

Two kinds of states. Whole: fp32 weights and moments, and the 16-bit weights that the model computes with are written
in the same pass. Halved: moments of 16 bits and fp32 weights in two halves. A weight is bf16, the lower half of its
fp32 value an int16 beside it, and the bf16 one is the nearest to both: TransformerEngine's format
(`store_param_remainders` of its FusedAdam), whose step unpacks moments to fp32 and packs them again with four launches
a tensor. Experts are thousands of tensors: a step waits for the CPU longer than for memory.
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
TRITON_DTYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int16: tl.int16,
}  # fmt: skip


class WholeWeight(NamedTuple):
    """Tensors of one weight with whole states: contiguous, of one size, on one device."""

    weight: Tensor
    """float32."""
    gradient: Tensor
    """float32 or bfloat16."""
    first_moment: Tensor
    """float32."""
    second_moment: Tensor
    """float32."""
    model_weight: Tensor
    """What the model computes with, of any float dtype; `weight` itself where it computes in float32."""


class HalvedWeight(NamedTuple):
    """Tensors of one weight with halved states: contiguous, of one size, on one device."""

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


type Weight = WholeWeight | HalvedWeight


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


class Kind(NamedTuple):
    """What the weights of one launch have in common."""

    is_whole: bool
    gradient_dtype: torch.dtype
    last_dtype: torch.dtype
    """Of the model's weight or of the remainder."""
    is_aligned: bool


class Launch(NamedTuple):
    """Where a launch finds its tensors, on their device."""

    addresses: Tensor
    """[n, 5] int64, in the order of :class:`WholeWeight` or :class:`HalvedWeight`."""
    sizes: Tensor
    """[n] int64."""
    chunks: Tensor
    """[c, 2] int32: a tensor, and which of its chunks."""
    kind: Kind


def addresses_of(weights: Sequence[Weight]) -> list[tuple[int, ...]]:
    """Where the tensors lie; as long as this is the same, so are the launches."""
    return [tuple(tensor.data_ptr() for tensor in weight) for weight in weights]


def plan_launches(weights: Sequence[Weight]) -> list[Launch]:
    """Launches that step all of the weights, one for each kind of them: aligned or not, and of which dtypes."""
    kinds: dict[Kind, list[Weight]] = {}
    for weight, addresses in zip(weights, addresses_of(weights), strict=True):
        size = weight.weight.numel()
        assert all(tensor.is_contiguous() and tensor.numel() == size for tensor in weight)
        is_aligned = not (size % VECTOR or any(address % ALIGNMENT for address in addresses))
        kind = Kind(isinstance(weight, WholeWeight), weight.gradient.dtype, weight[-1].dtype, is_aligned)
        kinds.setdefault(kind, []).append(weight)
    return [_plan(chosen, kind) for kind, chosen in kinds.items()]


def _plan(weights: Sequence[Weight], kind: Kind) -> Launch:
    device = weights[0].weight.device
    sizes = torch.tensor([weight.weight.numel() for weight in weights])
    chunks = torch.tensor([*_chunks(sizes.tolist())], dtype=torch.int32).view(-1, 2)
    addresses = torch.tensor(addresses_of(weights))
    return Launch(addresses.to(device), sizes.to(device), chunks.to(device), kind)


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    for index, size in enumerate(sizes):
        yield from ((index, chunk) for chunk in range(-(-size // CHUNK)))


def adamw_step(launch: Launch, group: AdamW) -> None:
    """Step weights and states in place.

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        w = w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)

    in fp32 (Loshchilov and Hutter, 2019, algorithm 2); moments of 16 bits are rounded once they have been used.

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
        **_constants(launch.kind),
    )  # fmt: skip


def _constants(kind: Kind) -> dict[str, Any]:
    return {
        "IS_WHOLE": kind.is_whole, "GRADIENT": TRITON_DTYPES[kind.gradient_dtype],
        "LAST": TRITON_DTYPES[kind.last_dtype], "IS_ALIGNED": kind.is_aligned,
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
    IS_WHOLE: tl.constexpr, GRADIENT: tl.constexpr, LAST: tl.constexpr, IS_ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(chunks + tl.program_id(0) * 2).to(tl.int64)
    start = tl.load(chunks + tl.program_id(0) * 2 + 1).to(tl.int64) * CHUNK
    left = tl.load(sizes + tensor) - start
    if IS_ALIGNED:
        left = tl.multiple_of(left, VECTOR)
    WEIGHT: tl.constexpr = tl.float32 if IS_WHOLE else tl.int16  # type: ignore[assignment]
    MOMENT: tl.constexpr = tl.float32 if IS_WHOLE else tl.bfloat16  # type: ignore[assignment]
    weights = _pointer(addresses, tensor, 0, WEIGHT, IS_ALIGNED, ALIGNMENT) + start
    gradients = _pointer(addresses, tensor, 1, GRADIENT, IS_ALIGNED, ALIGNMENT) + start
    firsts = _pointer(addresses, tensor, 2, MOMENT, IS_ALIGNED, ALIGNMENT) + start
    seconds = _pointer(addresses, tensor, 3, MOMENT, IS_ALIGNED, ALIGNMENT) + start
    lasts = _pointer(addresses, tensor, 4, LAST, IS_ALIGNED, ALIGNMENT) + start
    for offset in range(0, CHUNK, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        is_inside = i < left
        g = gradient_scale * tl.load(gradients + i, is_inside, 0.0).to(tl.float32)
        m = tl.load(firsts + i, is_inside, 0.0).to(tl.float32)
        v = tl.load(seconds + i, is_inside, 0.0).to(tl.float32)
        if IS_WHOLE:
            w = tl.load(weights + i, is_inside, 0.0)
        else:
            low = tl.load(lasts + i, is_inside, 0)
            high = tl.load(weights + i, is_inside, 0)
            # The upper half was rounded up where the lower one is half a unit of it or more.
            high = tl.where(low < 0, high - 1, high)
            w = ((high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        root = tl.sqrt_rn(tl.div_rn(v, correction2))
        w -= lr * (tl.div_rn(tl.div_rn(m, correction1), root + eps) + weight_decay * w)
        if IS_WHOLE:
            tl.store(weights + i, w, is_inside)
            tl.store(lasts + i, w.to(LAST), is_inside)
        else:
            bits = w.to(tl.int32, bitcast=True)
            low = bits.to(tl.int16)
            high = (bits >> 16).to(tl.int16)
            tl.store(weights + i, tl.where(low < 0, high + 1, high), is_inside)
            tl.store(lasts + i, low, is_inside)
        tl.store(firsts + i, m.to(MOMENT), is_inside)
        tl.store(seconds + i, v.to(MOMENT), is_inside)
