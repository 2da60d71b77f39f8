# SPDX-License-Identifier: Apache-2.0
"""Copies between CPU and device that wait for no more than they must."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU by way of pinned memory.

    From other memory the copy waits until the GPU has done all that was asked of it before, and then the GPU waits for
    the CPU: with eight images in a row this took a sixth of a step of Qwen3-VL-4B on an H200.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def begin_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy to the CPU; what is returned waits for the copy, and for nothing that is launched after it."""
    if values.device.type != "cuda":
        return lambda: values
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copied.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return copied

    return wait
