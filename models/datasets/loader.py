# SPDX-License-Identifier: Apache-2.0
"""The loader: an endless, savable stream of micro-batches for one data-parallel rank.

Samples come from *streams*. A stream is one of energon's workers: its own part of the shards, its own order. The
streams of a rank are asked in turn, one sample each. There are as many streams whatever the number of ranks, so a
global batch holds the same samples on one rank and on eight::

    streams   0 1 2 3 4 5 6 7          global batch 16 = two samples of every stream
    dp = 1    0 1 2 3 4 5 6 7          one rank takes from all
    dp = 2    0 1 2 3 | 4 5 6 7        each takes from its half

Without worker processes all streams of a rank live in this process; with them, each is a process; the order is the
same. A sample that cannot be used is counted, and the next stream is asked: from there on another number of ranks
sees another order.
"""

import math
from typing import Any, Literal, Self

from models.common.batch import Batch
from models.common.sequences import EncodedSample
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError, DataError
from models.contract.recipe import FIXED_SHAPES, Recipe
from models.contract.site import Site
from models.datasets.collate import Collate, make_collate
from models.datasets.encoder import Rejection, make_encoder
from models.datasets.energon import open_dataset, worker_config
from models.datasets.fixed_shapes import FixedRows, row_shape
from models.datasets.ledger import SkipLedger
from models.datasets.packing import Pack
from models.datasets.shards import dataset_counts
from models.datasets.streams import FixedOrder, Streams, dataset_stamp, open_streams

STATE_VERSION = 1


class BatchLoader:
    """Iterator of :class:`Batch`. Endless for training; one pass, in order, for evaluation.

    `skipped` lists the samples that could not be used. `state_dict()` is plain JSON.
    """

    def __init__(
        self,
        source: Streams | FixedOrder | FixedRows,
        collate: Collate | None,
        *,
        samples_per_batch: int,
        ledger: SkipLedger,
        layout: dict[str, Any],
    ) -> None:
        self._source, self._collate, self._samples_per_batch = source, collate, samples_per_batch
        self._ledger, self._layout = ledger, layout

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        samples: list[EncodedSample] = []
        while len(samples) < self._samples_per_batch:
            outcome = self._source.next_sample()
            if isinstance(outcome, Rejection):
                self._ledger.reject(outcome)
                continue
            if isinstance(outcome, Batch):
                self._ledger.accept(len(outcome.sample_keys))
                return outcome
            if isinstance(outcome, Pack):
                self._ledger.accept(outcome.num_samples)
                for rejection in outcome.rejections:
                    self._ledger.reject(rejection)
                if outcome.batch is not None:
                    return outcome.batch
                continue
            self._ledger.accept()
            samples.append(outcome)
        assert self._collate is not None  # only a source of whole batches goes without
        return self._collate(samples)

    def close(self) -> None:
        """End the worker processes; torch would wait five seconds for each of them when this process ends."""
        self._source.close()

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Samples that could not be used, each once: file, key, reason, detail."""
        return list(self._ledger.samples)

    @property
    def num_read(self) -> int:
        """Samples read so far, over all passes, skipped ones included."""
        return self._ledger.num_read

    @property
    def num_skipped(self) -> int:
        """Skips so far, over all passes."""
        return self._ledger.num_skipped

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as plain JSON."""
        return {
            "version": STATE_VERSION, "layout": self._layout, "source": self._source.state(),
            **self._ledger.state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. Call it before the first batch.

        Raises:
            DataError: the state belongs to another dataset, seed, or layout of streams.
        """
        if state.get("version") != STATE_VERSION or state.get("layout") != self._layout:
            theirs, ours = state.get("layout") or {}, self._layout
            differing = [key for key in ours if theirs.get(key) != ours[key]]
            raise DataError(
                "the loader state belongs to another run", where="loader state",
                expected="; ".join(f"{key} = {ours[key]}" for key in differing),
                got="; ".join(f"{key} = {theirs.get(key)}" for key in differing) or "unknown version",
                fix="resume with the dataset, seed, num_workers and number of ranks that it was saved with",
            )  # fmt: skip
        self._source.restore(state["source"])
        self._ledger.restore(state)


def build_loader(
    recipe: Recipe,
    site: Site,
    architecture: Architecture,
    *,
    split: Literal["train", "val"],
    data_parallel_rank: int,
    data_parallel_size: int,
) -> BatchLoader:
    """Loader of one data-parallel rank.

    `train` never ends and can be saved; where the recipe states the shape of its rows it reads nothing. `val` is the
    held-out set in its fixed order: one pass, whose first samples are the same for every number of ranks; a last batch
    that is not full is left out, and so is packing.

    Raises:
        DataError: the dataset is missing, not indexed, lacks the split, or is too small for the ranks.
        ConfigError: settings that contradict each other, or a checkpoint without a usable processor.
    """
    data = recipe.data
    if data.fixed_shapes is not None:
        return _fixed_shapes_loader(recipe, architecture, split, data_parallel_rank, data_parallel_size)
    name, part = data.dataset, split
    if split == "val" and data.eval_dataset is not None:
        name, part = data.eval_dataset, "val"
    folder = site.dataset(name)
    count = dataset_counts(folder, part)
    encoder = make_encoder(data, architecture, site.checkpoint(recipe.model.checkpoint))
    packing = data.packing and split == "train"
    if packing and recipe.train.micro_batch_size != 1:
        raise ConfigError(
            "a pack is a micro-batch", where="[train] micro_batch_size", expected="1 with data.packing",
            got=str(recipe.train.micro_batch_size), fix="set it to 1; seq_length says how much a pack holds",
        )  # fmt: skip
    ledger = SkipLedger(str(folder), math.ceil(count / data_parallel_size), data.max_skipped_fraction)
    layout = {
        "dataset": dataset_stamp(folder, part), "split": split, "seed": recipe.train.seed,
        "data_parallel_rank": data_parallel_rank, "data_parallel_size": data_parallel_size,
        "num_workers": data.num_workers, "packing": packing, "micro_batch_size": recipe.train.micro_batch_size,
        "shuffle_buffer_size": data.shuffle_buffer_size,
    }  # fmt: skip
    if split == "train":
        source: Streams | FixedOrder = open_streams(
            recipe, str(folder), count, encoder, data_parallel_rank, data_parallel_size
        )
    else:
        reader = open_dataset(str(folder), part, worker_config(0, 1, 0, 0), training=False).reader()
        source = FixedOrder(reader, encoder, first=data_parallel_rank, step=data_parallel_size)
    return BatchLoader(
        source,
        make_collate(recipe, encoder, packing=False),
        samples_per_batch=recipe.train.micro_batch_size,
        ledger=ledger,
        layout=layout,
    )


def _fixed_shapes_loader(
    recipe: Recipe, architecture: Architecture, split: str, rank: int, size: int
) -> BatchLoader:
    """Rows of the shape that the recipe states; neither site nor checkpoint folder is looked at."""
    if split != "train":
        raise ConfigError(
            "rows of a stated shape have no held-out part", where="[data.fixed_shapes]", expected="split train",
            got=split, fix="leave evaluation out",
        )  # fmt: skip
    shape, seed = row_shape(recipe.data), recipe.train.seed
    layout = {
        "dataset": f"{FIXED_SHAPES}: {shape}", "split": split, "seed": seed, "data_parallel_rank": rank,
        "data_parallel_size": size, "num_workers": 0, "packing": recipe.data.packing, "micro_batch_size": 1,
    }  # fmt: skip
    return BatchLoader(
        FixedRows(architecture, shape, seed=seed, rank=rank, size=size),
        None,
        samples_per_batch=1,
        ledger=SkipLedger(FIXED_SHAPES, 1, recipe.data.max_skipped_fraction),
        layout=layout,
    )
