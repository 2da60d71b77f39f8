# SPDX-License-Identifier: Apache-2.0
"""megatron-core's groups for one process, for tests that build a model."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state
from torch import distributed

from models.training.cpu import cpu_megatron


@pytest.fixture
def single_process() -> Iterator[None]:
    """One gloo process with megatron-core's groups, on the CPU; taken down after the test."""
    torch.set_num_threads(1)
    with cpu_megatron():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
