# SPDX-License-Identifier: Apache-2.0
"""What bf16 and TF32 explain of a difference from transformers, and what only other experts do. On the CPU.

The GPU parity test takes its limits from here: :data:`models.parity.single.LIMITS`.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.common.settings import DTYPES, ModelSettings
from models.parity.cases import AUDIO_CASES, CASES
from models.parity.compare import real_positions
from models.parity.oracles import TINY
from models.parity.routing import dictated, num_elsewhere, recorded
from models.parity.single import LIMITS, Pair, make_pair, measure_rounding

pytestmark = pytest.mark.usefixtures("single_process")
DROPPED = 13
"""Bits of an fp32 number that TF32 does not have; it keeps ten of the fraction."""


class TensorFloat32(TorchDispatchMode):
    """Matrix products take TF32, rounded to nearest even."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if first is not None:
            args = (*args[:first], *(rounded(operand) for operand in args[first:]))
        return func(*args, **(kwargs or {}))


def rounded(operand: Tensor) -> Tensor:
    bits = operand.contiguous().view(torch.int32)
    half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    return ((bits + half) >> DROPPED << DROPPED).view(torch.float32)


def pair_of(name: str, dtype: str = "bf16") -> Pair:
    return make_pair(name, ModelSettings(dtype=DTYPES[dtype], moe_aux_loss_coeff=0.0))


def check(pair: Pair, case: str, kind: str) -> int:
    made, reference = pair.case(case)
    with TensorFloat32() if kind == "tf32" else contextlib.nullcontext():
        found = measure_rounding(pair, made, reference, gradient_floor=LIMITS[kind].gradient_floor)
    print(f"{pair.name}, {kind}, {case}: {found}")  # noqa: T201 - the limits' record
    assert not found.exceeding(LIMITS[kind]), found
    return found.num_elsewhere


@pytest.mark.parametrize("name", TINY)
def test_bf16_explains_the_difference(name: str) -> None:
    check(pair_of(name), "video", "bf16")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_tf32_explains_the_difference(name: str) -> None:
    check(pair_of(name, "fp32"), "image", "tf32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "tf32"])
@pytest.mark.parametrize("name", TINY)
def test_rounding_explains_every_case(name: str, kind: str) -> None:
    pair = pair_of(name, "bf16" if kind == "bf16" else "fp32")
    for case in [*CASES, *(AUDIO_CASES if pair.architecture.audio is not None else ())]:
        check(pair, case, kind)


def test_other_experts_are_what_bf16_does_not_explain() -> None:
    pair = pair_of("qwen3_vl_moe")
    made, reference = pair.case("video")
    limits = LIMITS["bf16"]
    found = measure_rounding(pair, made, reference, gradient_floor=limits.gradient_floor)
    assert 0 < found.num_elsewhere < found.num_tokens / 4
    assert found.free_logits > limits.logits > found.dictated.logits


@pytest.mark.parametrize("case", ["text", "mixed"])  # rows of one length, and of several
def test_in_fp32_both_sides_choose_the_same_experts(case: str) -> None:
    pair = pair_of("qwen3_vl_moe", "fp32")
    made, reference = pair.case(case)
    found = measure_rounding(pair, made, reference, gradient_floor=LIMITS["fp32"].gradient_floor)
    assert found.num_elsewhere == 0
    assert not found.exceeding(LIMITS["fp32"])


def test_dictated_experts_are_used_and_forgotten_again() -> None:
    pair = pair_of("qwen3_vl_moe", "fp32")
    made, reference = pair.case("text")
    rows, is_real = made.batch.input_ids.shape[0], real_positions(made.batch)
    others = tuple((experts + 1) % 6 for experts in reference.routing)
    with torch.no_grad():
        wanted = pair.model(made.batch)
        with dictated(pair.model, others, rows):
            moved = pair.model(made.batch)
        with recorded(pair.model, rows) as own:
            after = pair.model(made.batch)
    assert (moved - wanted).abs().max() > 0.01
    assert torch.equal(after, wanted)
    assert num_elsewhere(own, reference.routing, is_real)[0] == 0
    assert num_elsewhere(others, reference.routing, is_real)[0] > 0.5 * is_real.sum()
