# SPDX-License-Identifier: Apache-2.0
"""The two formats that results are written in: torch's sharded format (torch_dist, DCP) and safetensors.

Every block is read back from the file and compared with memory before the next one.
"""

import json
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from models.contract.errors import RunError
from models.conversion.checkpoint_folder import DTYPE_NAMES
from models.conversion.dcp_folder import METADATA_FILE
from models.conversion.job import OutputFile, Span
from models.conversion.recorded_checksums import write_checksums
from models.conversion.tensor_source import TensorSource, TensorSpec
from models.conversion.workers import Advance

BLOCK_BYTES = 8 * 2**20
"""Memory of one block; a worker holds about three. Small enough that the allocator gives the same pages again."""
READ_BACK_BYTES = 2**18
SMALL_BYTES = 2**14
FILE_BYTES = 256 * 2**20
"""Size of one file of a sharded checkpoint, so that a killed conversion loses little and several workers have work."""
COMMON_STATE = {"common_state/shard_0_1": [{}]}
"""What megatron-core wants in a torch_dist checkpoint beside the tensors: its (empty) common state."""
_LOCAL = threading.local()


def row_blocks(name: str, spec: TensorSpec) -> Iterator[Span]:
    """Cut a tensor into blocks of rows of at most `BLOCK_BYTES` (one row is never cut); experts one by one."""
    rows = spec.num_rows
    step = 1 if len(spec.shape) > 2 else _halved(rows, max(1, BLOCK_BYTES * rows // max(spec.num_bytes, 1)))
    for start in range(0, rows, step):
        yield Span(name, start, min(start + step, rows))


def _halved(rows: int, most: int) -> int:
    """Rows of a block, at most `most`: what halving leaves, where it comes out even.

    Gate and up projections, and the two halves of the tensor that joins them, are then cut at the same rows, and
    blocks are read without putting them together.
    """
    step = rows
    while step > most and step % 2 == 0:
        step //= 2
    return min(step, most)


def plan_sharded(specs: Mapping[str, TensorSpec], folder: str) -> tuple[OutputFile, ...]:
    """Lay tensors out over the files of a sharded checkpoint, in order."""
    files: list[OutputFile] = []
    spans: list[Span] = []
    size = 0

    def close() -> None:
        nonlocal spans, size
        if spans:
            files.append(OutputFile(f"{folder}/__{len(files)}_0.distcp", tuple(spans), size))
        spans, size = [], 0

    for name, spec in specs.items():
        for span in row_blocks(name, spec):
            num_bytes = spec.num_bytes * (span.stop - span.start) // max(spec.num_rows, 1)
            if size + num_bytes > FILE_BYTES:
                close()
            spans.append(span)
            size += num_bytes
    close()
    return tuple(files)


def write_sharded(file: OutputFile, path: Path, source: TensorSource, advance: Advance) -> dict[str, Any]:
    """Write one file of a sharded checkpoint; the journal entry says where each chunk is, and its hash."""
    records = []
    with path.open("w+b", buffering=0) as stream:
        for span in file.spans:
            tensor = source.read(span.name, span.start, span.stop)
            tensor = (
                tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor.contiguous()
            )
            offset = stream.tell()
            archive = _CheckedStream(stream, path)
            torch.save(tensor, archive)  # pyright: ignore[reportArgumentType] - it writes and flushes
            archive.close()
            if archive.error is not None:
                raise archive.error
            length = stream.tell() - offset
            records.append(
                [span.name, span.start, list(tensor.shape), offset, length, archive.digest.hexdigest()]
            )
            advance(tensor.nbytes)
    return {"records": records}


def write_metadata(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    entries: Mapping[str, dict[str, Any]],
    objects: Mapping[str, Any],
) -> None:
    """Write what makes a folder of chunk files a sharded checkpoint: the objects' file and the metadata.

    `record_checksums` comes last, when everything else is in the folder.

    Args:
        folder: Where the chunk files are.
        specs: Every tensor.
        entries: Journal entry of each file, by its name in the folder.
        objects: Small values to store beside the tensors.
    """
    states: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, spec in specs.items():
        properties = TensorProperties(dtype=spec.dtype)
        states[name] = TensorStorageMetadata(properties=properties, size=torch.Size(spec.shape), chunks=[])
    for file, entry in entries.items():
        for name, start, shape, offset, length, _ in entry["records"]:
            offsets = torch.Size((start, *(0 for _ in shape[1:]))) if shape else torch.Size(())
            states[name].chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(shape)))
            storage[MetadataIndex(name, offsets)] = _StorageInfo(file, offset, length)
    file = f"__{len(entries)}_0.distcp"
    with (folder / file).open("wb") as stream:
        for name, value in objects.items():
            offset = stream.tell()
            torch.save(value, stream)
            states[name] = BytesStorageMetadata()
            storage[MetadataIndex(name)] = _StorageInfo(file, offset, stream.tell() - offset)
    metadata = Metadata(state_dict_metadata=states, storage_data=storage)
    with (folder / METADATA_FILE).open("wb") as stream:
        pickle.dump(metadata, stream)


def record_checksums(folder: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Write the checksums of a finished folder; `entries` as in :func:`write_metadata`."""
    chunks = {
        file: [(offset, length, digest) for *_, offset, length, digest in entry["records"]]
        for file, entry in entries.items()
    }
    write_checksums(folder, chunks)


def plan_safetensors(
    files: Mapping[str, list[str]], specs: Mapping[str, TensorSpec]
) -> tuple[OutputFile, ...]:
    """Files of a safetensors checkpoint, each with its tensors in the order of their bytes."""
    return tuple(
        OutputFile(
            path,
            tuple(span for name in names for span in row_blocks(name, specs[name])),
            sum(specs[name].num_bytes for name in names),
        )
        for path, names in files.items()
    )


def write_safetensors(
    file: OutputFile, path: Path, source: TensorSource, header: bytes, advance: Advance
) -> dict[str, Any]:
    """Write one safetensors file under a given header."""
    with path.open("w+b", buffering=0) as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for span in file.spans:
            tensor = source.read(span.name, span.start, span.stop)
            _write_checked(
                stream, memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()), path
            )
            advance(tensor.nbytes)
    return {}


def make_header(names: list[str], specs: Mapping[str, TensorSpec]) -> bytes:
    """A safetensors header for tensors in the order of their bytes, padded to eight bytes as the format asks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


class _CheckedStream:
    """What `torch.save` writes to. An error is kept until the end: torch's archive writer cannot be left half-way.

    The archive's many small parts (headers, padding) are gathered, and only the elements are written on their own.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.error: OSError | RunError | None = None
        self.small = bytearray()
        self.digest = xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        """Take bytes; write large ones at once."""
        view = memoryview(data).cast("B")
        if len(view) < SMALL_BYTES:
            self.small += view
        else:
            self.close()
            self._write(view)
        return len(view)

    def close(self) -> None:
        """Write what was gathered."""
        self._write(memoryview(bytes(self.small)))
        self.small.clear()

    def flush(self) -> None:
        """Torch calls it at its own end; `close` comes after."""

    def _write(self, view: memoryview) -> None:
        if self.error is None:
            self.digest.update(view)
            try:
                _write_checked(self.stream, view, self.path)
            except (OSError, RunError) as error:
                self.error = error


def _write_checked(stream: BinaryIO, data: memoryview, path: Path) -> None:
    """Write, read back, compare: a little at a time, so that all three find the bytes in the processor's cache."""
    handle, start = stream.fileno(), stream.tell()
    for begin in range(0, len(data), READ_BACK_BYTES):
        part = data[begin : begin + READ_BACK_BYTES]
        back = _scratch() if len(part) == READ_BACK_BYTES else bytearray(len(part))
        written = os.pwrite(handle, part, start + begin)
        if written != len(part):  # a disk that fills up takes a part, and says why at the next attempt
            os.pwrite(handle, part[written:], start + begin + written)
        # A bytearray compares with any buffer as memory; two memoryviews go element by element, forty times slower.
        if os.preadv(handle, [back], start + begin) != len(part) or back != part:
            raise RunError(
                "what was written reads back differently", where=str(path),
                got=f"a difference after byte {start + begin}",
                fix="check the disk; nothing was put under the final name",
            )  # fmt: skip
    stream.seek(start + len(data))


def _scratch() -> bytearray:
    """One buffer for each thread."""
    if not hasattr(_LOCAL, "buffer"):
        _LOCAL.buffer = bytearray(READ_BACK_BYTES)
    return _LOCAL.buffer
