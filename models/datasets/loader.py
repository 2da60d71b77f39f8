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

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from megatron.energon.errors import FatalSampleError

from models.common.batch import Batch
from models.common.sequences import EncodedSample
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError, DataError
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.datasets.encoder import Rejection, SampleEncoder, make_encoder
from models.datasets.energon import ChatTaskEncoder, open_dataset, open_stream, worker_config
from models.datasets.loader_state import decode_state, encode_state
from models.datasets.packing import PackingTaskEncoder, packing_buffer_size
from models.datasets.shards import dataset_counts

logger = logging.getLogger(__name__)

MAX_STREAMS = 16
"""Streams in one process: each keeps a few files open."""
PATIENCE = 32
"""Samples that may be rejected from the start before a dataset counts as wholly rejected."""
MIN_READ = 200
"""Samples read before the skipped share is judged; a smaller dataset is judged after one pass."""
STATE_VERSION = 1


@dataclass(slots=True)
class SkipLedger:
    """Which samples were skipped, and when that is too much.

    Raises:
        DataError: from `reject`, when nothing is usable or the share passes `max_fraction`.
    """

    folder: str
    num_samples: int
    max_fraction: float
    num_read: int = 0
    num_skipped: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    """Every skipped sample once: file, key, reason, detail."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Skips by reason."""

    def accept(self, count: int = 1) -> None:
        """Count used samples."""
        self.num_read += count

    def reject(self, rejection: Rejection) -> None:
        """Count a skipped sample, and judge."""
        self.num_read += 1
        self.num_skipped += 1
        self.reasons[rejection.reason] += 1
        entry = rejection.to_dict()
        if entry not in self.samples:
            self.samples.append(entry)
            logger.warning(
                "skipped %s in %s: %s %s", entry["key"], entry["file"], entry["reason"], entry["detail"]
            )
        if rejection.stops_the_run:
            raise DataError(
                f"unusable sample: {rejection.reason}", where=f"{self.folder}: {rejection.file}: {rejection.key}",
                got=rejection.detail, fix='raise data.seq_length, or set data.over_length to "skip" or "truncate"',
            )  # fmt: skip
        self._judge()

    def _judge(self) -> None:
        nothing_usable = self.num_skipped == self.num_read
        if nothing_usable and self.num_read >= min(PATIENCE, self.num_samples):
            raise self._error(f"no usable sample among the first {self.num_read}", "at least one")
        limit = self.max_fraction
        judged = self.num_read >= min(MIN_READ, self.num_samples)
        if judged and self.num_skipped > limit * self.num_read:
            raise self._error(
                f"too many samples skipped: {self.num_skipped} of {self.num_read}", f"at most {limit:.1%}"
            )

    def _error(self, what: str, expected: str) -> DataError:
        first = self.samples[0]
        return DataError(
            what, where=self.folder, expected=expected,
            got="; ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common(3))
            + f"; first: {first['file']}: {first['key']}: {first['detail'] or first['reason']}",
            fix="look at it with `qwen-harness data inspect`, repair it, or raise data.max_skipped_fraction",
        )  # fmt: skip


class BatchLoader:
    """Iterator of :class:`Batch`. Endless for training; one pass, in order, for evaluation.

    `skipped` lists the samples that could not be used. `state_dict()` is plain JSON.
    """

    def __init__(
        self,
        source: "Streams | FixedOrder",
        collate: Callable[[list[EncodedSample]], Batch],
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
            if isinstance(outcome, list):  # a pack, whole
                pack = self._usable(outcome)
                if pack:
                    return self._collate(pack)
                continue
            self._ledger.accept()
            samples.append(outcome)
        return self._collate(samples)

    def _usable(self, outcomes: list[EncodedSample | Rejection]) -> list[EncodedSample]:
        for outcome in outcomes:
            if isinstance(outcome, Rejection):
                self._ledger.reject(outcome)
            else:
                self._ledger.accept()
        return [outcome for outcome in outcomes if isinstance(outcome, EncodedSample)]

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
        ledger = self._ledger
        return {
            "version": STATE_VERSION, "layout": self._layout, "source": self._source.state(),
            "num_read": ledger.num_read, "num_skipped": ledger.num_skipped, "skipped": ledger.samples,
            "reasons": dict(ledger.reasons),
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
        self._ledger.num_read, self._ledger.num_skipped = state["num_read"], state["num_skipped"]
        self._ledger.samples, self._ledger.reasons = list(state["skipped"]), Counter(state["reasons"])


class Streams:
    """Energon loaders of one rank, asked in turn."""

    def __init__(self, loaders: list[Any], folder: str) -> None:
        self._loaders, self._folder = loaders, folder
        self._iterators: list[Iterator[Any]] | None = None
        self._turn = 0

    def next_sample(self) -> EncodedSample | Rejection | list[EncodedSample | Rejection]:
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

    def state(self) -> Any:
        """Plain JSON."""
        return {
            "turn": self._turn,
            "loaders": [encode_state(loader.save_state_rank()) for loader in self._loaders],
        }

    def restore(self, state: Any) -> None:
        """Restore before the first sample."""
        self._turn = state["turn"]
        self._iterators = None
        for loader, saved in zip(self._loaders, state["loaders"], strict=True):
            loader.restore_state_rank(decode_state(saved))


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

    def state(self) -> Any:
        """Plain JSON."""
        return self._next

    def restore(self, state: Any) -> None:
        """Go to where `state` was taken."""
        self._next = state


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

    `train` never ends and can be saved. `val` is the held-out set in its fixed order: one pass, whose first samples
    are the same for every number of ranks; a last batch that is not full is left out, and so is packing.

    Raises:
        DataError: the dataset is missing, not indexed, lacks the split, or is too small for the ranks.
        ConfigError: settings that contradict each other, or a checkpoint without a usable processor.
    """
    data = recipe.data
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
        source: Streams | FixedOrder = _streams(
            recipe, str(folder), count, encoder, data_parallel_rank, data_parallel_size
        )
    else:
        reader = open_dataset(str(folder), part, worker_config(0, 1, 0, 0), training=False).reader()
        source = FixedOrder(reader, encoder, first=data_parallel_rank, step=data_parallel_size)
    return BatchLoader(
        source,
        make_collate(recipe, encoder, packing=packing),
        samples_per_batch=recipe.train.micro_batch_size,
        ledger=ledger,
        layout=layout,
    )


def make_collate(
    recipe: Recipe, encoder: SampleEncoder, *, packing: bool
) -> Callable[[list[EncodedSample]], Batch]:
    """How samples become a batch under a recipe: padded length, packing, and what the layout needs to divide."""
    parallel = recipe.parallel
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    sequence = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple = context * sequence * (16 if recipe.precision.fp8 else 1)
    length = recipe.data.seq_length if recipe.data.padding == "max_length" else None
    if length is not None and length % multiple:
        raise ConfigError(
            "seq_length does not divide over the layout", where="[data] seq_length",
            expected=f"a multiple of {multiple}", got=str(length),
        )  # fmt: skip

    def collate(samples: list[EncodedSample]) -> Batch:
        return encoder.family.build_batch(
            samples, pad_token=encoder.pad_token, seq_length=length, packing=packing, multiple_of=multiple,
            sequence_multiple_of=context if packing else 1,
        )  # fmt: skip

    return collate


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


def _streams(
    recipe: Recipe, folder: str, count: int, encoder: SampleEncoder, rank: int, size: int
) -> Streams:
    data, seed = recipe.data, recipe.train.seed
    total = num_streams(recipe, size, count)
    mine = total // size
    buffer = math.ceil(data.shuffle_buffer_size / total)  # not of the ranks: see the top
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
