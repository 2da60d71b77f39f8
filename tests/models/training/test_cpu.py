# SPDX-License-Identifier: Apache-2.0
"""Each patch is needed, does what it says, and is taken back."""

import megatron.core
import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random

from models.contract.errors import EnvironmentMismatch
from models.training.cpu import PATCHES, cpu_megatron


def test_patches_are_named_and_taken_back() -> None:
    before = (
        torch.cuda.current_device,
        torch.Tensor.cuda,
        torch.Tensor.type,
        schedules.torch,
        random._get_cuda_rng_state,
    )
    with cpu_megatron() as names:
        assert names == tuple(patch.__name__ for patch in PATCHES)
        assert schedules.torch is not before[3]
    after = (
        torch.cuda.current_device,
        torch.Tensor.cuda,
        torch.Tensor.type,
        schedules.torch,
        random._get_cuda_rng_state,
    )
    assert after == before


def test_factories_of_patched_modules_put_cuda_tensors_on_the_cpu() -> None:
    with cpu_megatron():
        assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
        assert schedules.torch.zeros(2, device="meta").device.type == "meta"
        assert schedules.torch.device("cuda").type == "cpu"
        assert isinstance(torch.device("cpu"), schedules.torch.device)
        assert schedules.torch.float32 is torch.float32


def test_parameter_type_names_what_the_optimizer_looks_for() -> None:
    with cpu_megatron():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.int32).dtype == torch.int32
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_random_tracker_forks_the_cpu_generator() -> None:
    with cpu_megatron():
        tracker = random.CudaRNGStatesTracker()
        torch.manual_seed(5)
        tracker.add("branch", 7)
        with tracker.fork("branch"):
            inside = torch.rand(2)
        outside = torch.rand(2)
    assert torch.equal(outside, torch.rand(2, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(7)))


def test_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.20.0")
    with pytest.raises(EnvironmentMismatch, match=r"0\.20\.0"), cpu_megatron():
        pass


def test_gpu_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EnvironmentMismatch, match="would hide a GPU"), cpu_megatron():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is missing without a GPU")
def test_patches_are_still_needed() -> None:
    """Fails once megatron-core runs on a CPU by itself: then the patch goes."""
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        random._get_cuda_rng_state()
