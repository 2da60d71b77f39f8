# SPDX-License-Identifier: Apache-2.0
"""What of a batch lies where a GPU reads it from, on its way through torch's loader."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from models.common.batch import CPU_FIELDS, Batch
from models.datasets.packing import Pack

BATCH = Batch(
    input_ids=torch.zeros(1, 4, dtype=torch.long),
    position_ids=torch.zeros(3, 1, 4, dtype=torch.long),
    pixel_values=torch.zeros(8, 6),
    grid_thw=torch.tensor([[1, 2, 4]]),
    cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
    sample_keys=("a",),
)


@pytest.mark.parametrize("batch", [BATCH, None])
def test_a_loader_pins_what_goes_to_the_device(batch: Batch | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())
    sample: dict[str, Any] = {"__key__": "a", "encoded": Pack(batch, 1, ())}
    pinned: Any = pin_memory(sample)
    found = pinned["encoded"]
    if batch is None:
        assert found.batch is None
        return
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(found.batch, field.name)
        is_moved = isinstance(before, Tensor) and field.name not in CPU_FIELDS
        assert (after is before) != is_moved, field.name
        assert not is_moved or torch.equal(before, after), field.name
