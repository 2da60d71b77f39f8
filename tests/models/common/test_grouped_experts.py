# SPDX-License-Identifier: Apache-2.0
"""Experts on the short way, kernels interpreted, against megatron-core's own and, in whole models, transformers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from models.common.grouped_experts import can_be_grouped
from models.common.settings import ModelSettings
from models.parity.single import LIMITS, make_pair, measure_rounding
from tests.models.common.grouped_way import TorchGroupedLinear, experts_of, grouped_way_everywhere

pytestmark = pytest.mark.usefixtures("single_process")

COUNTS = {"uneven": (3, 0, 5, 1, 0, 4), "one expert": (0, 0, 7, 0, 0, 0), "no rows": (0,) * 6}


def first_experts(*, is_short: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The experts of a tiny model's first layer; the same weights every time, rounded to the dtype."""
    with grouped_way_everywhere(is_short=is_short):
        pair = make_pair("qwen3_vl_moe", ModelSettings(moe_aux_loss_coeff=0.0, dtype=dtype, **changes))
    return experts_of(pair.model.language_model)[0]


def inputs(
    experts: Any, counts: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [t, h], rows of each expert [e] and probabilities [t]; gradients are wanted of the first and the last."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(sum(counts), experts.config.hidden_size, generator=generator).to(dtype)
    probs = torch.rand(sum(counts), generator=generator)
    return rows.requires_grad_(), torch.tensor(counts), probs.requires_grad_()


def run(experts: Any, counts: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """What experts put out, and every gradient of the sum of its squares."""
    experts.zero_grad()
    rows, tokens_per_expert, probs = inputs(experts, counts, dtype)
    out, bias = experts(rows, tokens_per_expert, probs)
    assert bias is None
    out.float().square().sum().backward()
    found = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return found | {"out": out.detach(), "rows": rows.grad, "probs": probs.grad}


@pytest.fixture
def refuses_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("went expert by expert")

    monkeypatch.setattr(TorchGroupedLinear, "forward", refuse)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
def test_experts_equal_those_of_megatron_core(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(first_experts(is_short=False), counts)
    short = first_experts(is_short=True)
    assert [name for name, _ in short.linear_fc1.named_parameters()] == [
        f"weight{i}" for i in (5, 4, 3, 2, 1, 0)
    ]
    with monkeypatch.context() as patched:
        patched.setattr(TorchGroupedLinear, "forward", None)
        found = run(short, counts)
        short.activation_recompute = True
        recomputed = run(short, counts)
    # Autograd took what it was given: all of a layer's gradients are in one piece of memory, none was copied.
    gradients: list[Any] = [weight.grad for weight in short.linear_fc1.parameters()]
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        if expected is None:
            assert found[name] is None
            continue
        torch.testing.assert_close(
            found[name],
            expected,
            rtol=1e-5,
            atol=1e-5 * float(expected.abs().max() if expected.numel() else 1),
        )
        assert torch.equal(recomputed[name], found[name])  # type: ignore[arg-type]


@pytest.mark.usefixtures("refuses_the_long_way")
def test_sixteen_bits_round_as_often_as_a_fused_activation_does() -> None:
    short = first_experts(is_short=True, dtype=torch.bfloat16)
    found = run(short, COUNTS["uneven"], torch.bfloat16)
    exact = first_experts(is_short=False)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(dict(short.named_parameters())[name])
    rows, tokens, probs = inputs(exact, COUNTS["uneven"], torch.bfloat16)
    weights = [
        [getattr(linear, f"weight{i}") for i in range(6)] for linear in (exact.linear_fc1, exact.linear_fc2)
    ]
    parts = []
    for part, share, fc1, fc2 in zip(
        rows.float().split(tokens.tolist()), probs.split(tokens.tolist()), *weights, strict=True
    ):
        gate, up = (part @ fc1.t()).chunk(2, dim=1)
        parts.append(F.silu(gate) * up * share[:, None] @ fc2.t())
    out = torch.cat(parts)
    out.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in exact.named_parameters()}
    expected |= {"out": out.detach(), "rows": rows.grad, "probs": probs.grad}
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-6)
        assert float((found[name].float() - value.float()).abs().max()) / scale < 2e-2, name  # type: ignore[union-attr]
    assert found["out"].dtype is torch.bfloat16  # type: ignore[union-attr]
    assert found["probs"].dtype is torch.float32  # type: ignore[union-attr]


@pytest.mark.usefixtures("refuses_the_long_way")
def test_what_is_frozen_gets_no_gradient() -> None:
    experts = first_experts(is_short=True)
    whole = run(experts, COUNTS["uneven"])
    experts.requires_grad_(False)
    frozen = run(experts, COUNTS["uneven"])
    assert all(frozen[name] is None for name, _ in experts.named_parameters())
    assert all(torch.equal(frozen[name], whole[name]) for name in ("out", "rows", "probs"))  # type: ignore[arg-type]
    experts.requires_grad_(True)
    rows, tokens, probs = inputs(experts, COUNTS["uneven"])
    experts(rows.detach(), tokens, probs.detach())[0].square().sum().backward()
    assert all(torch.equal(p.grad, whole[name]) for name, p in experts.named_parameters())  # type: ignore[arg-type]
    with torch.no_grad():
        assert not experts(rows, tokens, probs)[0].requires_grad


@pytest.mark.usefixtures("refuses_the_long_way")
def test_weights_that_are_still_under_way_are_waited_for() -> None:
    experts = first_experts(is_short=True)
    expected = run(experts, COUNTS["uneven"])
    for linear in (experts.linear_fc1, experts.linear_fc2):
        values = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}

        def arrive(
            module: Any, _: Any, values: dict[str, Tensor] = values
        ) -> None:  # as with data parallelism
            module.load_state_dict(values)

        linear.register_forward_pre_hook(arrive)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()
    found = run(experts, COUNTS["uneven"])
    assert torch.equal(found["out"], expected["out"])  # type: ignore[arg-type]


def test_short_way_is_closed_to_those_who_watch_and_to_other_formats() -> None:
    experts = first_experts(is_short=True)
    seen: list[Any] = []
    handle = experts.linear_fc2.register_forward_hook(lambda *given: seen.append(given))
    run(experts, COUNTS["uneven"])
    handle.remove()
    assert len(seen) == 1
    run(experts, COUNTS["uneven"])
    assert len(seen) == 1
    half, calls = experts.half(), []
    for linear in (half.linear_fc1, half.linear_fc2):
        inner = linear.forward
        linear.forward = lambda *given, inner=inner: calls.append(1) or inner(*given)
    run(half, COUNTS["uneven"], torch.float16)
    assert len(calls) == 2


@pytest.mark.parametrize("change", [
    {"fp8": "e4m3"}, {"fp4": "e2m1"}, {"add_bias_linear": True}, {"activation_func": F.gelu},
    {"gated_linear_unit": False},
    {"activation_func_clamp_value": 7.0}, {"glu_linear_offset": 1.0}, {"moe_apply_probs_on_input": True},
    {"moe_mlp_glu_interleave_size": 32}, {"use_te_activation_func": True}, {"delay_wgrad_compute": True},
    {"moe_single_grouped_weight": True}, {"moe_ffn_hidden_size": 30}, {"hidden_size": 50},
    {"use_transformer_engine_op_fuser": True},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_short_way_is_closed_to_experts_that_it_does_not_compute(change: dict[str, Any]) -> None:
    config: TransformerConfig = first_experts(is_short=True).config
    assert can_be_grouped(config)
    for name, value in change.items():
        setattr(config, name, value)
    assert not can_be_grouped(config)


@pytest.mark.slow  # interpreted kernels are slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_vl_moe", {}),
        ("qwen3_omni", {}),
        ("qwen3_vl_moe", {"recompute": "full", "recompute_num_layers": 1}),
    ],
    ids=["qwen3_vl_moe", "qwen3_omni", "recompute"],
)
@pytest.mark.usefixtures("refuses_the_long_way")
def test_model_equals_transformers(name: str, changes: dict[str, Any]) -> None:
    with grouped_way_everywhere():
        pair = make_pair(name, dataclasses.replace(ModelSettings(moe_aux_loss_coeff=0.0), **changes))
    made, reference = pair.case("mixed")
    found = measure_rounding(pair, made, reference, gradient_floor=LIMITS["fp32"].gradient_floor)
    assert found.dictated.num_gradients == len(pair.rules)
    assert not found.exceeding(LIMITS["fp32"]), str(found)
