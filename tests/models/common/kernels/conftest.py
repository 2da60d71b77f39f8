# SPDX-License-Identifier: Apache-2.0
"""Kernels run where the tests run: on the GPU, or interpreted on the CPU (see the top conftest)."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
