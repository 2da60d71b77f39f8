# SPDX-License-Identifier: Apache-2.0
"""Every random generator of a process, as plain data that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def capture(device: torch.device) -> dict[str, Any]:
    """States of the Python, NumPy, torch, device and tensor-parallel generators."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries draw from it
    return {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(),
        "tensor_parallel": dict(_tracker().get_states()),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`capture` took."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state["device"])
    _tracker().set_states(state["tensor_parallel"])


def reset_tensor_parallel() -> None:
    """Forget the tensor-parallel generators, as in a process that has set up no groups."""
    _tracker().reset()
