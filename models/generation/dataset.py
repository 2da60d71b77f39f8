# SPDX-License-Identifier: Apache-2.0
"""Samples of a prepared dataset in their stored order, once."""

from collections.abc import Iterator
from pathlib import Path

from models.datasets.energon import open_dataset, worker_config
from models.datasets.sample import Sample, SampleRejected, parse_sample
from models.datasets.shards import dataset_counts


def iter_samples(folder: Path, split: str, *, limit: int | None = None) -> Iterator[Sample | SampleRejected]:
    """Yield the samples of a split in the order of its shards; unusable ones as what they were rejected for.

    Args:
        folder: Prepared dataset.
        split: Name of the split.
        limit: Stop after this many; None reads all.

    Raises:
        DataError: the folder is not a prepared dataset, or has no such split.
    """
    total = dataset_counts(folder, split)
    reader = open_dataset(str(folder), split, worker_config(0, 1, 0, 0), training=False).reader()
    for index in range(total if limit is None else min(limit, total)):
        members = reader[index]
        if "__unreadable__" in members:
            yield SampleRejected("unreadable tar", f"{members['__key__']}: {members['__unreadable__']}")
            continue
        try:
            yield parse_sample(members)
        except SampleRejected as error:
            yield SampleRejected(error.reason, f"{members['__key__']}: {error.detail}")
