# SPDX-License-Identifier: Apache-2.0
"""Sequence packing on energon's task encoder.

    raw samples ─▶ measure ─▶ buffer ─▶ plan packs ─▶ decode and process ─▶ batch
                   text and image headers only        only what is packed now

The buffer holds samples as they lie in the shard, so it is small; lengths are exact before a pixel is decoded. A pack
becomes a batch where it is made: a worker process hands over a few large tensors instead of hundreds of small ones.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from megatron.energon import Cooker, TaskEncoder, stateless

from models.common.batch import Batch
from models.contract.recipe import DataSection, Recipe
from models.datasets.collate import make_collate
from models.datasets.encoder import Rejection, SampleEncoder
from models.datasets.energon import cook

MIN_BUFFER, MAX_BUFFER = 256, 2048
"""Samples that wait to be packed, for one stream."""


@dataclass(frozen=True, slots=True)
class Pack:
    """What became of the samples of one pack."""

    batch: Batch | None
    """None when none of them could be used."""
    num_samples: int
    """Samples in `batch`."""
    rejections: tuple[Rejection, ...]

    def pin_memory(self) -> Self:
        """With a batch that a GPU can read; torch's loaders call this."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


def packing_buffer_size(data: DataSection) -> int:
    """Samples to choose from. Longer packs take more samples, and so need more to choose from."""
    return min(MAX_BUFFER, max(MIN_BUFFER, data.seq_length // 4))


def plan_packs(
    lengths: Sequence[int], vision: Sequence[int], *, capacity: int, vision_budget: int | None = None
) -> list[list[int]]:
    """Share samples over packs: longest first, each into the fullest pack that still takes it (best fit decreasing).

    Args:
        lengths: Tokens of each sample.
        vision: Merged vision tokens of each sample.
        capacity: Tokens of a pack.
        vision_budget: Vision tokens of a pack; a sample above it stays alone. None leaves `capacity` as the bound.

    Returns:
        Indices of the samples of each pack; packs in the order of their first sample, samples in given order.
    """
    budget = capacity if vision_budget is None else vision_budget
    rooms: list[tuple[int, int]] = []  # (room left, pack), sorted
    seen: list[int] = []  # vision tokens of each pack
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, pixels = lengths[index], vision[index]
        at = bisect_left(rooms, (length, -1))
        while at < len(rooms) and seen[rooms[at][1]] + pixels > budget:
            at += 1
        if at < len(rooms):
            room, pack = rooms.pop(at)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
            seen.append(0)
        packs[pack].append(index)
        seen[pack] += pixels
        if room > length:
            insort(rooms, (room - length, pack))
    return sorted(sorted(pack) for pack in packs)


class PackingTaskEncoder(TaskEncoder):
    """Raw members to packs: ``{"encoded": Pack}``."""

    decoder = None
    cookers = (Cooker(cook),)  # pyright: ignore[reportArgumentType] - crude members, not a Sample

    def __init__(self, encoder: SampleEncoder, recipe: Recipe) -> None:
        super().__init__()
        self.encoder = encoder
        self.collate = make_collate(recipe, encoder, packing=True)
        self.capacity = recipe.data.seq_length
        self.vision_budget = recipe.data.vision_tokens_per_pack
        parallel = recipe.parallel.context_parallel_size
        self.multiple_of = 2 * parallel if parallel > 1 else 1

    @stateless
    def preencode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Measure a sample; its members stay as they are."""
        return {
            "__key__": sample["__key__"], "__restore_key__": sample["__restore_key__"],
            "members": sample, "measure": self.encoder.measure(sample),
        }  # fmt: skip

    def select_samples_to_pack(self, samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Plan the packs of a full buffer. Rejected samples travel alone."""
        usable = [sample for sample in samples if not isinstance(sample["measure"], Rejection)]
        rejected = [[sample] for sample in samples if isinstance(sample["measure"], Rejection)]
        step = self.multiple_of
        plan = plan_packs(
            [-(-sample["measure"][0] // step) * step for sample in usable],
            [sample["measure"][1] for sample in usable],
            capacity=self.capacity,
            vision_budget=self.vision_budget,
        )
        return rejected + [[usable[index] for index in pack] for pack in plan]

    @stateless
    def postencode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Decode and process a sample whose pack is due."""
        measured = sample["measure"]
        encoded = measured if isinstance(measured, Rejection) else self.encoder(sample["members"])
        return {
            "__key__": sample["__key__"],
            "__restore_key__": sample["__restore_key__"],
            "encoded": encoded,
        }

    @stateless
    def pack_selected_samples(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Lay the samples of one pack out in a row."""
        outcomes = [sample["encoded"] for sample in samples]
        usable = [outcome for outcome in outcomes if not isinstance(outcome, Rejection)]
        pack = Pack(
            batch=self.collate(usable) if usable else None, num_samples=len(usable),
            rejections=tuple(outcome for outcome in outcomes if isinstance(outcome, Rejection)),
        )  # fmt: skip
        return {
            "__key__": ",".join(sample["__key__"] for sample in samples),
            "__restore_key__": (),
            "encoded": pack,
        }
