# SPDX-License-Identifier: Apache-2.0
"""What is loaded into an optimizer whose states lie on the CPU. The whole of it runs on GPUs only (test_gpu_states)."""

from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from models.training.optimizer import settle_offloaded


class OnDevice(torch.Tensor):
    """Passes for one that lies on a GPU; so do its copies."""

    is_cuda = True  # type: ignore[assignment]


class CountingAdam(torch.optim.AdamW):
    """Counts its steps in the group, like TransformerEngine's; a step takes the count off every weight."""

    def step(self, closure: Any = None) -> None:
        """One step of every group."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.data.sub_(group["step"])


@pytest.fixture
def hybrid(monkeypatch: pytest.MonkeyPatch) -> HybridDeviceOptimizer:
    """megatron-core's, without a device: all parameters are of the optimizer that would be the device's."""

    class Stream:
        def wait_stream(self, other: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    weights = [torch.zeros(2, dtype=torch.bfloat16).as_subclass(OnDevice) for _ in range(2)]
    return HybridDeviceOptimizer(
        [{"params": weights}], offload_fraction=0.0, cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=CountingAdam, param_update_in_fp32=True, overlap_cpu_optimizer_d2h_h2d=False,
    )  # fmt: skip


def test_offloaded_weights_and_counts_go_on_from_what_was_loaded(hybrid: HybridDeviceOptimizer) -> None:
    hybrid.dummy_step()  # makes states, as megatron-core does before it reads them
    state = hybrid.state_dict()
    state["param_groups"][0]["step"] = 4
    hybrid.load_state_dict(state)
    for value, weight in enumerate(hybrid.param_groups[0]["params"]):
        hybrid.state[weight]["master_param"] = torch.full((2,), 20.0 + value)
    settle_offloaded(hybrid)
    weights = hybrid.param_groups[0]["params"]
    for expected in ((15.0, 16.0), (9.0, 10.0)):  # 20 - 5, - 6
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        hybrid.step()
        assert tuple(float(weight.detach()[0]) for weight in weights) == expected
