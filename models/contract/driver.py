# SPDX-License-Identifier: Apache-2.0
"""What a GPU's driver is told. It listens once, when the first library asks for a device: at an import, say."""

import os
from collections.abc import MutableMapping

DRIVER_DEFAULTS = {
    # How far the CPU may be ahead of a GPU: 1,024 launches, unless said. A vision tower has more, all of them short.
    # Held up in the layers before it, the CPU had not launched the tower when its turn came: the GPU waited for 402 ms
    # of a step of Qwen2.5-VL-7B with eight micro-batches, and waits for 40 with queues four times as long (H200).
    "CUDA_SCALE_LAUNCH_QUEUES": "4x",
}


def set_driver_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set; before torch, megatron-core and TransformerEngine are imported, later it does nothing."""
    for name, value in DRIVER_DEFAULTS.items():
        environment.setdefault(name, value)
