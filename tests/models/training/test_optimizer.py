# SPDX-License-Identifier: Apache-2.0
"""Optimizer states on the CPU that go on from a checkpoint, where a CPU plays the device (test_gpu_states has one)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training import optimizer
from models.training.progress import TrainOptions
from models.training.start import train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
OPTIMIZER = {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 0}


class OnHost(torch.Tensor):
    """A copy that was made to lie on the CPU; so do its own copies."""

    is_cuda = False  # type: ignore[assignment]


class Stream:
    """Everything has happened."""

    def wait_stream(self, other: Any) -> None: ...
    def wait(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self) -> "Stream":
        return self

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """megatron-core's offloading optimizer tells devices apart where there is none."""
    split, empty = HybridDeviceOptimizer._get_sub_optimizer_param_groups, torch.empty

    def split_as_if_on_a_device(self: Any, fraction: float) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
            patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.as_subclass(OnHost))
            return split(self, fraction)

    def empty_anywhere(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    monkeypatch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", split_as_if_on_a_device)
    monkeypatch.setattr(torch, "empty", empty_anywhere)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(optimizer, "check_optimizer", lambda recipe, device: None)
    with torch.serialization.safe_globals([OnHost]):
        yield


@pytest.mark.usefixtures("device_of_its_own")
@pytest.mark.parametrize(
    ("resharding", "share"),
    [
        ("data", 0.5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("data", 1.0), ("any", 0.5), ("any", 1.0))
        ),
    ],
)
def test_offloaded_run_that_goes_on_equals_the_whole_one(
    resharding: str, share: float, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(
        precision={"dtype": "bf16"},
        optimizer=OPTIMIZER | {"cpu_offload_fraction": share},
        checkpoint={"save_interval": 2, "resharding": resharding},
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run, options in (
        (whole, TrainOptions()),
        (cut, TrainOptions(stop_after=4)),
        (cut, TrainOptions(is_resume=True)),
    ):
        train(recipe, site, run, options)
    assert rows_of(cut) == rows_of(whole)
    losses = [row["lm_loss"] for row in rows_of(whole)]
    assert losses[4] < losses[0] - 0.5


class CountingAdam(torch.optim.AdamW):
    """Counts its steps in the group, like TransformerEngine's; a step takes the count off every weight."""

    def step(self, closure: Any = None) -> None:
        """One step of every group."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.data.sub_(group["step"])


@pytest.mark.usefixtures("device_of_its_own")
def test_weights_and_counts_on_the_device_go_on_from_what_was_loaded() -> None:
    weights = [torch.zeros(2, dtype=torch.bfloat16) for _ in range(2)]
    hybrid = HybridDeviceOptimizer(
        [{"params": weights}], offload_fraction=0.0, cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=CountingAdam, param_update_in_fp32=True, overlap_cpu_optimizer_d2h_h2d=False,
    )  # fmt: skip
    hybrid.dummy_step()  # makes states, as megatron-core does before it reads them
    state = hybrid.state_dict()
    state["param_groups"][0]["step"] = 4
    hybrid.load_state_dict(state)
    weights = hybrid.param_groups[0]["params"]
    for value, weight in enumerate(weights):
        hybrid.state[weight]["master_param"] = torch.full((2,), 20.0 + value)
    optimizer.settle_offloaded(hybrid)
    for expected in ((15.0, 16.0), (9.0, 10.0)):  # 20 - 5, - 6
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        hybrid.step()
        assert tuple(float(weight[0]) for weight in weights) == expected
