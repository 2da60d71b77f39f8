# SPDX-License-Identifier: Apache-2.0
"""Read a Hugging Face checkpoint folder by the names on disk, one range of rows at a time, trusting nothing.

The format is small (an 8-byte length, a JSON header, the bytes), and reading it here gives errors that name the
file and the tensor, positional reads that never map a whole shard into memory, and the byte layout that export copies.
"""

import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from models.common.weight_rules import Shape
from models.contract.errors import WeightMappingError
from models.conversion.tensor_source import TensorSpec, few

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit, bytes


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `start` and `stop` are byte offsets from the beginning of the file."""

    file: str
    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return self.stop - self.start


@dataclass(slots=True)
class CheckpointFolder:
    """An open checkpoint folder. Use as a context manager."""

    folder: Path
    tensors: dict[str, TensorEntry]
    """Every tensor by name: file by file, in the order of the bytes."""
    files: tuple[str, ...]
    headers: dict[str, bytes]
    """The JSON header of each file, as stored."""
    stamps: dict[str, tuple[int, int]]
    """Size and modification time of each file when it was opened."""
    _handles: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and number format of every tensor by name."""
        return {name: TensorSpec(entry.shape, entry.dtype) for name, entry in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `[start, stop)` of a tensor, or all of it.

        Raises:
            WeightMappingError: there is no such tensor, or the file ended early or changed since it was opened.
        """
        if name not in self.tensors:
            raise WeightMappingError("tensor is not in the checkpoint", where=str(self.folder), expected=name)
        entry = self.tensors[name]
        if not entry.shape:
            return self.read_bytes(entry.file, entry.start, entry.stop).view(entry.dtype).reshape(())
        stop = entry.shape[0] if stop is None else stop
        row = entry.num_bytes // max(entry.shape[0], 1)
        data = self.read_bytes(entry.file, entry.start + start * row, entry.start + stop * row)
        return data.view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def read_bytes(self, file: str, start: int, stop: int) -> torch.Tensor:
        """Bytes `[start, stop)` of a file as a uint8 tensor."""
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        read_exactly(self._handle(file), memoryview(buffer.numpy()), start, where=self.folder / file)
        return buffer

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._handles[file]

    def check_unchanged(self) -> None:
        """Raise WeightMappingError if a file was replaced or written to since it was opened."""
        check_stamps(self.folder, self.stamps)


def open_checkpoint(folder: Path) -> CheckpointFolder:
    """Open a folder with `model.safetensors`, or shards and their index.

    Raises:
        WeightMappingError: no safetensors, a missing or cut-off shard, a broken header, an index that disagrees with
            its files.
    """
    index_file = folder / INDEX_FILE
    weight_map = read_index(folder)["weight_map"] if index_file.is_file() else None
    files = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (SINGLE_FILE,)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise WeightMappingError(
            "checkpoint files are missing", where=str(folder),
            expected=", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            got=", ".join(others[:5]) or "no safetensors files",
            fix="download the missing files (weights in another format are not read)",
        )  # fmt: skip
    checkpoint = CheckpointFolder(folder, {}, files, {}, {file: stamp(folder / file) for file in files})
    for file in files:
        header, entries = _read_header(folder / file)
        checkpoint.headers[file] = header
        for name, entry in entries:
            if name in checkpoint.tensors:
                raise WeightMappingError(
                    "a tensor is stored twice", where=name, got=f"{checkpoint.tensors[name].file} and {file}"
                )
            checkpoint.tensors[name] = entry
    if weight_map is not None:
        _check_index(folder, weight_map, checkpoint.tensors)
    return checkpoint


def read_index(folder: Path) -> dict[str, Any]:
    """The parsed index file. Raises WeightMappingError if it is cut off or has another form."""
    file = folder / INDEX_FILE
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightMappingError(
            "the checkpoint index is not valid JSON", where=str(file), got=str(error)
        ) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    well_formed = isinstance(weight_map, dict) and all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    )
    if not well_formed or not weight_map:
        raise WeightMappingError(
            "the checkpoint index has no usable weight_map", where=str(file),
            expected="a map from tensor names to file names in the same folder",
        )  # fmt: skip
    return index


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    wrong = sorted(
        name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file
    )
    extra = sorted(name for name in tensors if name not in weight_map)
    if wrong or extra:
        raise WeightMappingError(
            "the index and the files disagree", where=str(folder / INDEX_FILE),
            expected="every tensor of the index in the file it names, and no other",
            got=f"not where the index says: {few(wrong)}; not in the index: {few(extra)}",
            fix="take the index and the shards from the same download",
        )  # fmt: skip


def _read_header(file: Path) -> tuple[bytes, list[tuple[str, TensorEntry]]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _broken(file, "a header length inside the file", f"{length} in a file of {size} bytes")
        header = stream.read(length)
    try:
        parsed = json.loads(header)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _broken(file, "a JSON header", str(error)) from None
    if not isinstance(parsed, dict):
        raise _broken(file, "a JSON object as header", type(parsed).__name__)
    parsed.pop("__metadata__", None)
    entries = sorted(_entries(file, parsed, 8 + length), key=lambda item: (item[1].start, item[1].stop))
    end = 8 + length
    for name, entry in entries:
        if entry.start != end:
            raise _broken(file, f"'{name}' at byte {end}", f"byte {entry.start} (a gap or an overlap)")
        end = entry.stop
    if end != size:
        raise _broken(file, f"{end} bytes", f"{size} bytes: the file is cut off or has something appended")
    return header, entries


def _entries(file: Path, parsed: dict[str, Any], base: int) -> Iterator[tuple[str, TensorEntry]]:
    for name, value in parsed.items():
        try:
            dtype, shape = DTYPES[value["dtype"]], tuple(int(extent) for extent in value["shape"])
            start, stop = (int(offset) for offset in value["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(
                file, f"dtype, shape and data_offsets of '{name}'", f"{value!r:.80} ({error!r})"
            ) from None
        expected = math.prod(shape) * dtype.itemsize
        if stop - start != expected or any(extent < 0 for extent in shape):
            raise _broken(file, f"{expected} bytes for '{name}' {shape}", f"{stop - start} bytes")
        yield name, TensorEntry(file.name, dtype, shape, base + start, base + stop)


def _broken(file: Path, expected: str, got: str) -> WeightMappingError:
    return WeightMappingError(
        "a safetensors file is broken",
        where=str(file),
        expected=expected,
        got=got,
        fix="download or copy it again",
    )


def read_exactly(handle: int, view: memoryview, start: int, *, where: Path) -> None:
    """Fill `view` with a file's bytes from `start` on. Raises WeightMappingError if the file ends early."""
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], start + done)
        if count == 0:
            raise WeightMappingError(
                "a checkpoint file ended early", where=str(where),
                expected=f"{start + len(view)} bytes", got=f"{start + done} bytes",
                fix="the file was cut or replaced while it was read: start again from a complete copy",
            )  # fmt: skip
        done += count


def stamp(file: Path) -> tuple[int, int]:
    """Size and modification time of a file, (-1, -1) if it is gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def check_stamps(folder: Path, stamps: dict[str, tuple[int, int]]) -> None:
    """Raise WeightMappingError if a file changed since its stamp was taken."""
    changed = [name for name, before in stamps.items() if stamp(folder / name) != before]
    if changed:
        raise WeightMappingError(
            "the checkpoint changed while it was being read", where=str(folder), got=few(changed),
            fix="wait until nothing writes to the folder, then start again",
        )  # fmt: skip
