# SPDX-License-Identifier: Apache-2.0
"""Where a rank's samples come from: energon streams asked in turn, or a split in its fixed order."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.energon.errors import FatalSampleError

from models.common.sequences import EncodedSample
from models.contract.errors import DataError
from models.contract.recipe import Recipe
from models.datasets.encoder import Rejection, SampleEncoder
from models.datasets.energon import ChatTaskEncoder, open_stream, worker_config
from models.datasets.loader_state import decode_state, encode_state
from models.datasets.packing import Pack, PackingTaskEncoder, packing_buffer_size

MAX_STREAMS = 16
"""Streams in one process: each keeps a few files open."""


class Streams:
    """Energon loaders of one rank, asked in turn."""

    def __init__(self, loaders: list[Any], folder: str) -> None:
        self._loaders, self._folder = loaders, folder
        self._iterators: list[Iterator[Any]] | None = None
        self._turn = 0

    def next_sample(self) -> EncodedSample | Rejection | Pack:
        """Next outcome of the stream whose turn it is; then it is the next one's, as it is among worker processes."""
        if self._iterators is None:
            self._iterators = [iter(loader) for loader in self._loaders]
        turn, self._turn = self._turn, (self._turn + 1) % len(self._loaders)
        try:
            return next(self._iterators[turn])["encoded"]
        except StopIteration:
            raise DataError(
                "a stream ended", where=self._folder, fix="the dataset is empty; prepare it again"
            ) from None
        except FatalSampleError as error:
            raise DataError("the dataset cannot be read", where=self._folder, got=str(error)[:500]) from error

    def close(self) -> None:
        """End the worker processes. Reading again would start others, from the beginning."""
        self._iterators = None
        for loader in self._loaders:
            # Torch ends its workers when this iterator is collected. Energon freezes the garbage collector, which then
            # finds no cycles, so the last reference is dropped by hand.
            loader._epoch_iterator = None
            loader._iterator = None

    def state(self) -> Any:
        """Plain JSON."""
        return {
            "turn": self._turn,
            "loaders": [encode_state(_saved(loader)) for loader in self._loaders],
        }

    def restore(self, state: Any) -> None:
        """Restore before the first sample."""
        if len(state["loaders"]) != len(self._loaders):
            raise DataError(
                "the loader state has another number of streams", where=self._folder,
                expected=str(len(self._loaders)), got=str(len(state["loaders"])),
                fix="resume with the number of data-parallel ranks that it was saved with",
            )  # fmt: skip
        self._turn = state["turn"]
        self._iterators = None
        for loader, saved in zip(self._loaders, state["loaders"], strict=True):
            loader.restore_state_rank(decode_state(saved))


def _saved(loader: Any) -> Any:
    """State of an energon loader, once every worker has one.

    A worker that is asked before it took its first checkpoint answers with an empty one that is a sample off.
    """
    while True:
        saved = loader.save_state_rank()
        if saved is None or not loader.num_workers or all(worker.state for worker in saved.worker_states):
            return saved
        time.sleep(0.02)


class FixedOrder:
    """One pass over a split in the order of its shards: every `step`-th sample from `first` on."""

    def __init__(self, reader: Any, encoder: SampleEncoder, *, first: int, step: int) -> None:
        self._reader, self._encoder, self._next, self._step = reader, encoder, first, step

    def next_sample(self) -> EncodedSample | Rejection:
        """Next outcome. Raises StopIteration at the end."""
        if self._next >= len(self._reader):
            raise StopIteration
        members = self._reader[self._next]
        self._next += self._step
        return self._encoder(members)

    def close(self) -> None:
        """Nothing is held open between two samples."""

    def state(self) -> Any:
        """Plain JSON."""
        return self._next

    def restore(self, state: Any) -> None:
        """Go to where `state` was taken."""
        self._next = state


def num_streams(recipe: Recipe, data_parallel_size: int, num_samples: int) -> int:
    """Streams over all ranks. With `num_workers` 0 it follows from the global batch, not from the ranks.

    Raises:
        DataError: fewer samples than streams that are needed at least.
    """
    data = recipe.data
    if data.num_workers or data.packing:
        wanted = data_parallel_size * max(1, data.num_workers)
    else:
        wanted = math.gcd(recipe.train.global_batch_size, MAX_STREAMS)
        while wanted > num_samples:
            wanted //= 2
        wanted = wanted if wanted and wanted % data_parallel_size == 0 else data_parallel_size
    if wanted > num_samples:
        raise DataError(
            "the dataset is smaller than its streams", expected=f"at least {wanted} samples", got=str(num_samples),
            fix="lower data.num_workers or the number of data-parallel ranks, or add samples",
        )  # fmt: skip
    return wanted


def open_streams(
    recipe: Recipe, folder: str, count: int, encoder: SampleEncoder, rank: int, size: int
) -> Streams:
    """Streams of one rank: this process reads all of them in turn, or one worker process each."""
    data, seed = recipe.data, recipe.train.seed
    total = num_streams(recipe, size, count)
    mine = total // size
    buffer = math.ceil(data.shuffle_buffer_size / total)  # not of the ranks: the order must not hang on them
    packing_buffer = packing_buffer_size(data) if data.packing else None
    task_encoder = PackingTaskEncoder(encoder, recipe) if data.packing else ChatTaskEncoder(encoder)
    if data.num_workers:
        configs = [worker_config(rank, size, data.num_workers, seed)]
    else:
        configs = [worker_config(rank * mine + i, total, 0, seed) for i in range(mine)]
    loaders = [
        open_stream(
            folder,
            "train",
            task_encoder,
            config,
            shuffle_buffer_size=buffer,
            packing_buffer_size=packing_buffer,
        )
        for config in configs
    ]
    return Streams(loaders, folder)


def dataset_stamp(folder: Path, split: str) -> str:
    """What makes a dataset another one: energon's index id and the split."""
    identity = folder / ".nv-meta" / "index.uuid"
    return f"{identity.read_text().strip() if identity.exists() else folder}:{split}"
