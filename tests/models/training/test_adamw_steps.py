# SPDX-License-Identifier: Apache-2.0
"""Steps in one launch, by a stand-in for TransformerEngine's AdamW, which runs on GPUs only."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.common.kernels import adamw
from models.training.adamw_steps import pieces, step_short_states, step_whole_states

SIZES = ((3, 5), (40,), (7,), (2, 2), (1,))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter walks through the whole of a chunk."""
    monkeypatch.setattr(adamw, "CHUNK", 32)
    monkeypatch.setattr(adamw, "BLOCK", 32)


class GroupAdam:
    """Like TransformerEngine's: a group counts its steps, and moments are rounded when it has stepped."""

    def __init__(self, groups: list[list[Any]], *, store_param_remainders: bool = True) -> None:
        settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}
        self.param_groups: list[dict[str, Any]] = [
            {"params": group, "lr": 0.1 * (i + 1)} | settings for i, group in enumerate(groups)
        ]
        self.state: dict[Any, dict[str, Tensor]] = {p: {} for group in groups for p in group}
        self.store_param_remainders = store_param_remainders
        self.unpacked: list[int] = []

    def initialize_state(self, parameter: Any, store_param_remainders: bool) -> None:
        """Zeros, and the lower halves of the weights or all of them."""
        moments = {
            name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")
        }
        rest = torch.zeros_like(parameter, dtype=torch.int16) if store_param_remainders else parameter.float()
        self.state[parameter].update(moments | {"master_param": rest})

    def step(self) -> None:
        """One step of every group."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            self.unpacked.append(sum(p.numel() for p in group["params"]))
            for p in group["params"]:
                if not self.state[p]:
                    self.initialize_state(p, self.store_param_remainders and p.dtype is torch.bfloat16)
                state, gradient = self.state[p], p.decoupled_grad
                first = 0.9 * state["exp_avg"].float() + 0.1 * gradient
                second = 0.99 * state["exp_avg_sq"].float() + 0.01 * gradient**2
                corrected = first / (1 - 0.9 ** group["step"]), second / (1 - 0.99 ** group["step"])
                master = weight_of(self, p) - group["lr"] * corrected[0] / (corrected[1].sqrt() + 1e-8)
                state["exp_avg"], state["exp_avg_sq"] = first.bfloat16(), second.bfloat16()
                p.copy_(master)
                if state["master_param"].dtype is torch.int16:
                    off = master.view(torch.int32).long() - (p.view(torch.int16).long() << 16)
                    state["master_param"] = off.to(torch.int16)
                else:
                    state["master_param"] = master


def weight_of(optimizer: GroupAdam, parameter: Any) -> Tensor:
    """In fp32, of both halves where there are two."""
    rest = optimizer.state[parameter]["master_param"]
    if rest.dtype is not torch.int16:
        return rest
    return ((parameter.view(torch.int16).long() << 16) + rest.long()).to(torch.int32).view(torch.float32)


def make_parameters(*dtypes: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, generator=generator).to(dtypes[i % len(dtypes)]) for i, size in enumerate(SIZES)
    ]


def stepped(optimizer: GroupAdam, parameters: list[Any], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        for parameter in parameters:
            parameter.decoupled_grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [weight_of(optimizer, parameter).clone() for parameter in parameters]


@pytest.mark.parametrize("piece", [1, 20, 10**9])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float32)],
    ids=["bf16", "fp16", "mixed"],
)
def test_steps_go_where_the_optimizers_own_go(dtypes: tuple[torch.dtype, ...], piece: int) -> None:
    found = []
    for is_own in (True, False):
        parameters = make_parameters(*dtypes)
        optimizer = GroupAdam([parameters[:3], [], parameters[3:]])
        if not is_own:
            step_short_states(optimizer, piece=piece)
        groups = optimizer.param_groups
        found.append(stepped(optimizer, parameters))
        assert optimizer.param_groups is groups
        assert [group.get("step") for group in groups] == [3, None, 3]
        assert [len(group["params"]) for group in groups] == [3, 0, 2]
    for one, other in zip(
        *found, strict=True
    ):  # moments of 16 bits differ by Triton's interpreter's rounding
        torch.testing.assert_close(one, other, rtol=2e-2, atol=4e-3)
    if torch.bfloat16 not in dtypes:
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        assert max(optimizer.unpacked) <= max(piece, 40)
    elif len(dtypes) == 1:
        assert not optimizer.unpacked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_scaled_in_the_next_step_and_in_no_other(dtype: torch.dtype) -> None:
    found = []
    for scales in ((0.25, 1.0), (1.0, 0.25), (1.0, 1.0)):
        parameters = make_parameters(dtype)
        optimizer: Any = GroupAdam([parameters])
        step_short_states(optimizer)
        for scale in scales:
            for parameter in parameters:
                parameter.decoupled_grad = torch.full(parameter.shape, 2.0)
            optimizer.gradient_scale = scale
            optimizer.step()
        assert optimizer.gradient_scale == 1.0
        found.append(float(optimizer.state[parameters[0]]["exp_avg"].float().mean()))
    # 0.9 (0.1 g1) + 0.1 g2
    assert found == pytest.approx([0.09 * 0.5 + 0.2, 0.18 + 0.1 * 0.5, 0.38], rel=2e-2)


def test_whole_weights_beside_bf16_ones_take_its_own_step() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = GroupAdam([parameters], store_param_remainders=False)
    step_short_states(optimizer)
    stepped(optimizer, parameters, 1)
    assert optimizer.unpacked == [sum(p.numel() for p in parameters)]


def test_states_that_were_loaded_are_the_ones_that_step() -> None:
    """Loading puts other tensors in their place."""
    parameters = make_parameters(torch.bfloat16)
    optimizer = GroupAdam([parameters])
    step_short_states(optimizer)
    stepped(optimizer, parameters, 1)
    for state in optimizer.state.values():
        state.update({name: torch.zeros_like(value) for name, value in state.items()})
    loaded = [optimizer.state[parameter]["exp_avg"] for parameter in parameters]
    stepped(optimizer, parameters, 1)
    for moment, parameter in zip(loaded, parameters, strict=True):
        torch.testing.assert_close(moment.float(), 0.1 * parameter.decoupled_grad, rtol=2**-7, atol=0.0)


def test_weight_without_a_gradient_stays() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = GroupAdam([parameters])
    step_short_states(optimizer)
    for parameter in parameters:
        parameter.decoupled_grad = torch.ones(parameter.shape)
    parameters[1].decoupled_grad = None
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    stayed = [torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
    assert stayed == [False, True, False, False, False]


def test_groups_are_whole_again_after_a_step_that_failed() -> None:
    parameters = make_parameters(torch.float16)
    optimizer = GroupAdam([parameters])
    step_short_states(optimizer, piece=1)
    before = copy.copy(optimizer.param_groups)
    with pytest.raises(AttributeError):  # no gradients
        optimizer.step()
    assert optimizer.param_groups == before


class Part:
    """Like Megatron's distributed optimizer: fp32 weights beside the model's of 16 bits, one without."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.shard_float16_groups: list[list[Any]] = [make_parameters(dtype)[:3], make_parameters(dtype)[3:]]
        self.shard_fp32_from_float16_groups: list[list[Any]] = [
            [weight.float() for weight in weights] for weights in self.shard_float16_groups
        ]
        self.alone: list[Any] = make_parameters(torch.float32)[:1]
        self.mains = [weight for weights in self.shard_fp32_from_float16_groups for weight in weights]
        first, second = self.shard_fp32_from_float16_groups
        self.optimizer: Any = WholeAdam([[*self.alone, *first], [], second])

    def _copy_main_params_to_model_params(self) -> None:
        for mains, weights in zip(
            self.shard_fp32_from_float16_groups, self.shard_float16_groups, strict=True
        ):
            for main, weight in zip(mains, weights, strict=True):
                weight.copy_(main)

    def steps(self, count: int = 3, scale: float = 0.5) -> None:
        """As Megatron's engine makes them; a weight in the middle gets no gradient in the second one."""
        generator = torch.Generator().manual_seed(2)
        for step in range(count):
            for parameter in (*self.alone, *self.mains):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 1:
                self.mains[1].grad = None
            if hasattr(self.optimizer, "gradient_scale"):
                self.optimizer.gradient_scale = scale
            else:
                torch._foreach_mul_([p.grad for p in (*self.alone, *self.mains) if p.grad is not None], scale)
            self.optimizer.step()
            self._copy_main_params_to_model_params()


class WholeAdam(GroupAdam):
    """With fp32 states, of fp32 weights that have gradients of their own."""

    def initialize_state(self, parameter: Any, store_param_remainders: bool) -> None:
        """Zeros."""
        assert not store_param_remainders
        self.state[parameter].update(
            {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        )

    def step(self) -> None:
        """One step of every group."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.initialize_state(p, False)
                state = self.state[p]
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].lerp_(p.grad**2, 0.01)
                first, second = state["exp_avg"] / (1 - 0.9 ** group["step"]), state["exp_avg_sq"]
                p.sub_(group["lr"] * first / ((second / (1 - 0.99 ** group["step"])).sqrt() + 1e-8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_states_go_where_the_optimizers_own_go(dtype: torch.dtype) -> None:
    own, ours = Part(dtype), Part(dtype)
    step_whole_states(ours)
    for part in (own, ours):
        part.steps()
    assert [group.get("step") for group in ours.optimizer.param_groups] == [3, None, 3]
    assert ours.optimizer.gradient_scale == 1.0
    assert not ours.optimizer.unpacked
    for one, other in zip((*own.alone, *own.mains), (*ours.alone, *ours.mains), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    weights = [weight for weights in ours.shard_float16_groups for weight in weights]
    for weight, main in zip(weights, ours.mains, strict=True):  # Triton's interpreter cuts off
        torch.testing.assert_close(weight.float(), main, rtol=2**-7, atol=1e-6)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_pieces_are_the_whole_in_order(sizes: list[int], piece: int) -> None:
    tensors = [torch.empty(size) for size in sizes]
    found = list(pieces(tensors, piece))
    assert [id(tensor) for part in found for tensor in part] == [id(tensor) for tensor in tensors]
    assert all(part and (len(part) == 1 or sum(t.numel() for t in part) <= piece) for part in found)
