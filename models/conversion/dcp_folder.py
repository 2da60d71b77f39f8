# SPDX-License-Identifier: Apache-2.0
"""Read a sharded checkpoint folder (torch's distributed format, which is also Megatron's torch_dist) by rows.

Works on checkpoints of any parallel layout: tensors are put together from the chunks that the ranks wrote. Only the
rows that are asked for are read. Nothing in the files is executed: the metadata and the chunk headers are pickles, and
are read with a list of the few types that they may contain.
"""

import io
import math
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from models.contract.errors import WeightMappingError
from models.conversion.checkpoint_folder import check_stamps, read_exactly, stamp
from models.conversion.recorded_checksums import digest_of, read_checksums
from models.conversion.regions import Box, row_box
from models.conversion.tensor_record import RawData, broken_checkpoint, locate
from models.conversion.tensor_source import TensorSpec

METADATA_FILE = ".metadata"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MODEL_PREFIXES = ("language_model.", "vision_model.", "audio_model.")
"""Model weights in a Megatron checkpoint; everything else is optimizer, scheduler or random state."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and where its file record is."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(slots=True)
class DcpFolder:
    """An open sharded checkpoint. Use as a context manager; reading is safe from several threads."""

    folder: Path
    specs: dict[str, TensorSpec]
    chunks: dict[str, tuple[Chunk, ...]]
    objects: tuple[str, ...]
    """Names of entries that are not tensors."""
    stamps: dict[str, tuple[int, int]]
    """Size and modification time of each file when it was opened."""
    digests: dict[tuple[str, int], str] = field(default_factory=dict)
    """By file and first byte: the recorded hash of each chunk's record, which reading compares."""
    _last: threading.local = field(default_factory=threading.local)
    _handles: dict[str, int] = field(default_factory=dict)
    _raw: dict[tuple[str, int], RawData | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of a tensor, put together from its chunks.

        Raises:
            WeightMappingError: there is no such tensor, or a file is cut off or not what the metadata says.
        """
        if name not in self.specs:
            raise WeightMappingError("tensor is not in the checkpoint", where=str(self.folder), expected=name)
        spec = self.specs[name]
        if not spec.shape:
            return self._chunk_rows(name, self.chunks[name][0], 0, 1).reshape(())
        wanted = row_box(spec.shape, start, stop)
        parts = [(chunk, shared) for chunk in self.chunks[name] if (shared := chunk.box.intersect(wanted))]
        out: torch.Tensor | None = None
        for chunk, shared in parts:
            first = shared.start[0] - chunk.box.start[0]
            value = self._chunk_rows(name, chunk, first, first + shared.size[0])
            if shared == wanted and value.shape == wanted.size:
                return value  # one chunk has it all: no copy
            if out is None:
                out = torch.empty(wanted.size, dtype=spec.dtype)
            inside = Box((shared.start[0], *shared.start[1:]), shared.size)
            origin = (shared.start[0], *chunk.box.start[1:])
            out[shared.slices(wanted.start)] = value[inside.slices(origin)]
        return torch.empty(wanted.size, dtype=spec.dtype) if out is None else out

    def only(self, keep: Callable[[str], bool]) -> "DcpFolder":
        """The same folder with only some of its tensors."""
        names = [name for name in self.specs if keep(name)]
        return self.replaced(
            {name: self.specs[name] for name in names}, {name: self.chunks[name] for name in names}
        )

    def replaced(self, specs: dict[str, TensorSpec], chunks: dict[str, tuple[Chunk, ...]]) -> "DcpFolder":
        """The same files with other names for their tensors. It is closed with this one."""
        return DcpFolder(
            self.folder, specs, chunks, self.objects, self.stamps, self.digests,
            self._last, self._handles, self._raw, self._lock,
        )  # fmt: skip

    def check_unchanged(self) -> None:
        """Raise WeightMappingError if a file was replaced or written to since it was opened."""
        check_stamps(self.folder, self.stamps)

    def _chunk_rows(self, name: str, chunk: Chunk, start: int, stop: int) -> torch.Tensor:
        raw = self._raw_data(name, chunk)
        recorded = self.digests.get((chunk.file, chunk.offset))
        if raw is None:  # an unusual record (a view, a compressed file): let torch read all of it
            record = self._bytes(chunk.file, chunk.offset, chunk.length).numpy().tobytes()
            whole = torch.load(io.BytesIO(record), weights_only=True)
            return whole[start:stop] if chunk.box.size else whole.reshape(1)
        row = math.prod(raw.shape[1:]) * raw.dtype.itemsize
        if recorded is None:
            data = self._bytes(chunk.file, raw.offset + start * row, (stop - start) * row)
        else:
            first = raw.offset - chunk.offset + start * row
            data = self._checked_record(name, chunk, recorded)[first : first + (stop - start) * row]
        return data.view(raw.dtype).reshape(stop - start, *raw.shape[1:])

    def _checked_record(self, name: str, chunk: Chunk, recorded: str) -> torch.Tensor:
        """A chunk's whole record, if its bytes are still those that were written.

        The last one is kept: heads and query groups are many small parts of one chunk.
        """
        key = (chunk.file, chunk.offset)
        if getattr(self._last, "key", None) != key:
            self._last.key = self._last.record = None  # its memory serves the next one
            record = self._bytes(chunk.file, chunk.offset, chunk.length)
            if digest_of(memoryview(record.numpy())) != recorded:
                raise WeightMappingError(
                    "a checkpoint's bytes are not those that were written", where=f"{self.folder / chunk.file}: {name}",
                    expected=f"hash {recorded} of bytes {chunk.offset} to {chunk.offset + chunk.length - 1}",
                    fix="use a good copy, or convert again; `convert verify FOLDER` lists all that changed",
                )  # fmt: skip
            self._last.key, self._last.record = key, record
        return self._last.record

    def _raw_data(self, name: str, chunk: Chunk) -> RawData | None:
        key = (chunk.file, chunk.offset)
        with self._lock:
            if key in self._raw:
                return self._raw[key]
        handle = self._handle(chunk.file)
        raw = locate(handle, chunk.offset, chunk.length, where=f"{self.folder / chunk.file}: {name}")
        if raw is not None and (raw.shape != chunk.box.size or raw.dtype != self.specs[name].dtype):
            raise broken_checkpoint(
                f"{self.folder / chunk.file}: {name}", f"{chunk.box.size} {self.specs[name].dtype}",
                f"{raw.shape} {raw.dtype}",
            )  # fmt: skip
        with self._lock:
            self._raw[key] = raw
        return raw

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._handles[file]

    def _bytes(self, file: str, start: int, count: int) -> torch.Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        read_exactly(self._handle(file), memoryview(data.numpy()), start, where=self.folder / file)
        return data


def open_dcp(folder: Path, *, check_bytes: bool = True) -> DcpFolder:
    """Open one iteration's folder of a sharded checkpoint.

    Args:
        folder: Where its metadata is.
        check_bytes: Compare what is read with the checksums that a conversion recorded, if it did.

    Raises:
        WeightMappingError: there is no readable metadata, files are missing or cut off, or chunks leave holes.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        raise WeightMappingError(
            "not a sharded checkpoint", where=str(folder), expected=METADATA_FILE,
            fix="give the folder of one iteration, or its parent with the tracker file",
        )  # fmt: skip
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        entries, storage = dict(metadata.state_dict_metadata), dict(metadata.storage_data)
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
    ) as error:
        raise broken_checkpoint(str(file), "checkpoint metadata", str(error) or "a cut-off file") from None
    specs, chunks, objects = {}, {}, []
    records = {
        (index.fqn, tuple(index.offset) if index.offset is not None else None): info
        for index, info in storage.items()
    }
    stamps = {path.name: stamp(path) for path in sorted(folder.glob("*.distcp"))}
    sizes = {name: size for name, (size, _) in stamps.items()}
    for name, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            objects.append(name)
            continue
        assert isinstance(entry, TensorStorageMetadata)
        specs[name] = TensorSpec(tuple(entry.size), entry.properties.dtype)
        chunks[name] = tuple(_chunk(name, part, records, sizes, folder) for part in entry.chunks)
        covered = sum(math.prod(chunk.box.size) for chunk in chunks[name])
        if covered != math.prod(specs[name].shape):
            raise broken_checkpoint(
                f"{folder}: {name}", f"{math.prod(specs[name].shape)} elements", f"{covered} in its chunks"
            )
    recorded = (read_checksums(folder) if check_bytes else None) or {}
    digests = {(name, start): digest for name, ranges in recorded.items() for start, _, digest in ranges}
    return DcpFolder(folder, specs, chunks, tuple(objects), stamps, digests)


def model_weights(folder: DcpFolder) -> DcpFolder:
    """The model weights of a Megatron checkpoint, without optimizer state and without TransformerEngine's scales."""
    return folder.only(lambda name: name.startswith(MODEL_PREFIXES) and not name.endswith("_extra_state"))


def find_iteration(folder: Path) -> Path:
    """The folder of one iteration: `folder` itself, or the one that its tracker file names.

    Raises:
        WeightMappingError: neither is there.
    """
    if (folder / METADATA_FILE).is_file():
        return folder
    for root in (folder, folder / "checkpoints"):
        tracker = root / TRACKER_FILE
        if tracker.is_file():
            text = tracker.read_text(encoding="utf-8", errors="replace").strip()
            chosen = root / (f"iter_{int(text):07d}" if text.isdigit() else text)
            if (chosen / METADATA_FILE).is_file() and Path(text).name == text:
                return chosen
            raise WeightMappingError(
                "the tracker file names a checkpoint that is not there", where=str(tracker), got=text,
                expected=f"a folder {chosen.name} with {METADATA_FILE}", fix="give the iteration's folder itself",
            )  # fmt: skip
    raise WeightMappingError(
        "no sharded checkpoint found", where=str(folder),
        expected=f"{METADATA_FILE}, or {TRACKER_FILE} and the folder it names",
    )  # fmt: skip


def _chunk(name: str, part: Any, records: dict[Any, Any], sizes: dict[str, int], folder: Path) -> Chunk:
    info = records.get((name, tuple(part.offsets)))
    if info is None:
        raise broken_checkpoint(
            f"{folder}: {name}", "a record for every chunk", f"none for {tuple(part.offsets)}"
        )
    if sizes.get(info.relative_path, -1) < info.offset + info.length:
        raise WeightMappingError(
            "a checkpoint file is missing or cut off", where=str(folder / info.relative_path),
            expected=f"at least {info.offset + info.length} bytes",
            got=f"{sizes[info.relative_path]} bytes" if info.relative_path in sizes else "no such file",
            fix="use a complete checkpoint",
        )  # fmt: skip
    return Chunk(Box(tuple(part.offsets), tuple(part.sizes)), info.relative_path, info.offset, info.length)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads checkpoint metadata; refuses every type that is not part of it."""

    def find_class(self, module: str, name: str) -> Any:
        for owner in (dcp_metadata, filesystem):
            if module == owner.__name__ and isinstance(getattr(owner, name, None), type):
                return getattr(owner, name)
        if (module, name) in _METADATA_TYPES:
            return _METADATA_TYPES[module, name]
        if (
            module == "megatron.core.dist_checkpointing.strategies.torch"
        ):  # plan details that reading does not need
            return _Ignored
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in checkpoint metadata")


class _Ignored:
    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        del state


_METADATA_TYPES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("io", "BytesIO"): io.BytesIO,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # Python 3.13
    ("builtins", "getattr"): lambda owner, name: getattr(owner, name) if owner in _ENUMS else _refuse(name),
} | {("torch", str(dtype).removeprefix("torch.")): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)}  # fmt: skip
_ENUMS = (dcp_metadata._MEM_FORMAT_ENCODING,)


def _refuse(name: str) -> Any:
    raise pickle.UnpicklingError(f"attribute {name} is not expected in checkpoint metadata")
