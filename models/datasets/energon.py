# SPDX-License-Identifier: Apache-2.0
"""Our side of megatron-energon: a reader that survives damaged shards, and the task encoder."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.energon import (
    Cooker,
    CrudeWebdataset,
    SavableDataset,
    TaskEncoder,
    WorkerConfig,
    get_savable_loader,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.metadataset.loader_interface import LoadedDataset

from models.datasets.encoder import SampleEncoder

READ_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError)


class TolerantReader(ShardInfosITarReader):
    """Random access to the samples of shards; an unreadable one becomes a marked sample instead of an error."""

    def __getitem__(self, idx: int) -> Any:
        """Members of sample `idx`: suffix → bytes, with energon's ``__key__``, ``__shard__``, ``__restore_key__``."""
        try:
            sample = super().__getitem__(idx)
        except READ_ERRORS as error:
            pointer = self._get_itar_sample_pointer(idx)
            shard = self.tar_filenames[pointer.tar_file_id]
            self.close()  # the handle may stand anywhere
            return {
                "__key__": f"sample {idx}", "__shard__": shard, "__restore_key__": ("Webdataset", idx),
                "__sources__": (), "__unreadable__": f"{type(error).__name__}: {error}",
            }  # fmt: skip
        return sample

    @contextmanager
    def _open_itarfile(self, tar_file_id: int) -> Iterator[Any]:
        """As the base class does, and forget what was read: tarfile keeps a record of every member for good."""
        with super()._open_itarfile(tar_file_id) as opened:
            tar_file: Any = opened
            try:
                yield tar_file
            finally:
                tar_file.members.clear()


class ChatWebdataset(CrudeWebdataset):
    """Stock crude webdataset with the tolerant reader; reads folders whatever class their dataset.yaml names."""

    def reader(self) -> TolerantReader:
        """Reader over the shards of this split."""
        return TolerantReader(
            self.path, self.shards, part_filter=self.part_filter, sample_filter=self.sample_filter
        )

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[Any]:
        """As the base class does, then exchange the reader."""
        dataset = super().build(worker_rotation_offset)
        loader: Any = dataset.dataset  # type: ignore[attr-defined]
        loader.join_readers = [self.reader()]
        return dataset


def open_dataset(folder: str, split: str, worker_config: WorkerConfig, *, training: bool) -> ChatWebdataset:
    """Open one split of an indexed dataset folder."""
    return ChatWebdataset(
        EPath(folder),
        decoder=None,
        split_part=split,
        split_config="split.yaml",
        training=training,
        worker_config=worker_config,
        max_samples_per_sequence=100 if training else None,
    )


@stateless
def cook(sample: dict[str, Any]) -> dict[str, Any]:
    """Pass raw members on: decoding happens where failures are counted."""
    return sample


class ChatTaskEncoder(TaskEncoder):
    """Raw members to ``{"encoded": EncodedSample | Rejection}``. Rejections travel like samples, so that the loader
    counts them in order, also across worker processes, and none is retried behind its back.
    """

    decoder = None
    cookers = (Cooker(cook),)  # pyright: ignore[reportArgumentType] - crude members, not a Sample

    def __init__(self, encoder: SampleEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Encode one sample; keeps energon's keys, so that states can be restored."""
        return {
            "__key__": sample["__key__"],
            "__restore_key__": sample["__restore_key__"],
            "encoded": self.encoder(sample),
        }


def worker_config(rank: int, world_size: int, num_workers: int, seed: int) -> WorkerConfig:
    """Energon's view of one stream. Errors are ours to see: nothing is logged and swallowed."""
    return WorkerConfig(
        rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=seed,
        global_error_handler=reraise_exception,
    )  # fmt: skip


def open_stream(
    folder: str, split: str, task_encoder: TaskEncoder, config: WorkerConfig, *, shuffle_buffer_size: int,
    packing_buffer_size: int | None = None,
) -> Any:  # fmt: skip
    """An endless, shuffled, savable loader of single encoded samples."""
    dataset = task_encoder.build_train_datasets(
        datasets=[LoadedDataset(dataset=open_dataset(folder, split, config, training=True))],
        worker_config=config,
        batch_size=None,
        shuffle_buffer_size=shuffle_buffer_size,
        packing_buffer_size=packing_buffer_size,
    )
    return get_savable_loader(
        dataset, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None, checkpoint_every_sec=0,
        checkpoint_every_min_n_samples=1,
    )  # fmt: skip
