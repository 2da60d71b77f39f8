# SPDX-License-Identifier: Apache-2.0
"""A decoder layer in fp8: the short way against TransformerEngine's modules, which round the same, on a GPU."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from models.common.settings import ModelSettings
from tests.models.common.fp8_layers import SIZES, decoder_layer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_gpu")]

NUM_ROWS = 256
SAME = 1e-2
"""Both round the same values of bf16, which come out of other kernels."""
FP8 = 0.15
"""How far fp8 is off, squares averaged, at most."""


def make_layer(name: str, **changes: Any) -> Any:
    settings = ModelSettings(device="cuda", attention_backend="te", dtype=torch.bfloat16, **changes)
    layer = decoder_layer(name, settings)
    generator = torch.Generator(device="cuda").manual_seed(5)
    for parameter in layer.parameters():
        scale = 0.05 if parameter.ndim > 1 else 0.1
        values = torch.randn(parameter.shape, generator=generator, device="cuda") * scale
        parameter.data.copy_(values + (parameter.ndim == 1))
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    return layer


def run(layer: Any, *, num_micro_batches: int = 1) -> dict[str, Tensor]:
    """What the layer puts out and the gradients that it adds up, with the input's of the last micro-batch."""
    found: dict[str, Tensor] = {}
    for index in range(num_micro_batches):
        generator = torch.Generator(device="cuda").manual_seed(index)
        states = torch.randn(
            NUM_ROWS, 1, SIZES.hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()
        angles = torch.rand(NUM_ROWS, 1, 1, SIZES.kv_channels, generator=generator, device="cuda")
        with get_fp8_context(layer.config):
            out = layer(states, attention_mask=None, rotary_pos_emb=angles)[0]
        out.backward(torch.randn(out.shape, generator=generator, device="cuda", dtype=torch.bfloat16))
        assert states.grad is not None
        found = {"out": out.detach(), "states": states.grad}
    for name, parameter in layer.named_parameters():
        added = parameter.grad_added_to_main_grad or parameter.grad is None
        found[name] = parameter.main_grad if added else parameter.grad.float()
    return found


def through_modules(name: str, fp8: str) -> Any:
    layer = make_layer(name, fp8=fp8)
    layer._is_short = False
    return layer


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of what is wanted."""
    return {
        key: ((found[key].float() - value.float()).norm() / value.float().norm()).item()
        for key, value in wanted.items()
    }


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_short_way_rounds_as_the_modules_do(name: str, fp8: str) -> None:
    layer = make_layer(name, fp8=fp8)
    assert layer._is_short
    products = layer._products
    products._rounding = dataclasses.replace(products._rounding, swiglu=None, swiglu_backward=None)
    short, modules, exact = run(layer), run(through_modules(name, fp8)), run(make_layer(name))
    assert short.keys() == modules.keys()
    worst, rounding = distances(short, modules), distances(modules, exact)
    print(name, fp8, "short way to modules", worst, "modules to bf16", rounding)  # noqa: T201 - the record
    assert max(worst.values()) < SAME, worst
    assert min(rounding.values()) > 2 * SAME, "not in fp8"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_largest_value_noted_on_the_way_rounds_as_well(name: str) -> None:
    short, modules = run(make_layer(name, fp8="tensorwise")), run(through_modules(name, "tensorwise"))
    exact = run(make_layer(name))
    found, allowed = distances(short, exact), distances(modules, exact)
    print(name, "short way to bf16", found, "modules to bf16", allowed)  # noqa: T201 - the record
    assert all(found[key] < 1.25 * allowed[key] for key in found)


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_selective_recompute_changes_no_gradient(fp8: str) -> None:
    kept, recomputed = (run(make_layer("qwen3_vl", fp8=fp8, recompute=how)) for how in ("none", "selective"))
    assert all(torch.equal(recomputed[key], value) for key, value in kept.items())


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_gradients_of_micro_batches_add_up(fp8: str) -> None:
    found = distances(
        *(run(make_layer("qwen3_vl", **how), num_micro_batches=3) for how in ({"fp8": fp8}, {}))
    )
    assert max(found.values()) < FP8, found


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_changed_weights_are_rounded_when_a_step_begins(fp8: str) -> None:
    layer = make_layer("qwen3_vl", fp8=fp8)
    before = run(layer)["out"]
    for parameter in layer.parameters():
        parameter.data.mul_(0.5)
    for module in layer.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True
    after = run(layer)["out"]
    layer._is_short = False
    now = {"out": after}
    assert distances(now, {"out": run(layer)["out"]})["out"] < SAME
    assert distances(now, {"out": before})["out"] > FP8
