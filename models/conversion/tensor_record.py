# SPDX-License-Identifier: Apache-2.0
"""Where the elements of a tensor lie inside the record that `torch.save` wrote, without reading or executing it."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from models.common.weight_rules import Shape
from models.contract.errors import WeightMappingError


@dataclass(frozen=True, slots=True)
class RawData:
    """Where a chunk's elements lie in its file, in C order."""

    offset: int
    dtype: torch.dtype
    shape: Shape


def locate(handle: int, start: int, length: int, *, where: str) -> RawData | None:
    """Find a tensor's elements inside its record (a zip archive with stored members).

    Args:
        handle: Open file.
        start: Where the record begins in it, bytes.
        length: Size of the record, bytes.
        where: For errors: file and tensor.

    Returns: None if the record is unusual (a view, a compressed file): torch can read it whole.

    Raises:
        WeightMappingError: it is no record of a tensor.
    """
    window = io.BufferedReader(_Window(handle, start, length))
    try:
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        pickled = members["data.pkl"]
        data = os.pread(handle, pickled.file_size, start + _member_data(handle, start, pickled))
        header = _TensorUnpickler(io.BytesIO(data)).load()
        info = members.get(f"data/{header.key}") if isinstance(header, _TensorHeader) else None
    except (zipfile.BadZipFile, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise broken_checkpoint(where, "a tensor record", str(error)) from None
    if info is None or info.compress_type != zipfile.ZIP_STORED or not header.is_plain:
        return None
    first = start + _member_data(handle, start, info)
    return RawData(first + header.offset * header.dtype.itemsize, header.dtype, header.shape)


def _member_data(handle: int, start: int, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes start, from the record's start. `ZipFile.read` would also check the CRC, which
    torch can leave out.
    """
    local = os.pread(handle, 30, start + info.header_offset)
    return (
        info.header_offset
        + 30
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, handle: int, start: int, length: int) -> None:
        self.handle, self.start, self.length, self.position = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self.length - self.position), 0)
        data = os.pread(self.handle, count, self.start + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@dataclass(frozen=True, slots=True)
class _TensorHeader:
    key: str
    dtype: torch.dtype
    offset: int
    shape: Shape
    stride: Shape

    @property
    def is_plain(self) -> bool:
        """Whether the elements lie in C order."""
        expected, stride = 1, []
        for extent in reversed(self.shape):
            stride.append(expected)
            expected *= extent
        plain = tuple(reversed(stride))
        return all(extent == 1 or a == b for extent, a, b in zip(self.shape, self.stride, plain, strict=True))


class _TensorUnpickler(pickle.Unpickler):
    """Reads the header of one saved tensor and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _TensorHeader(
                storage[2], storage[1], offset, tuple(size), tuple(stride)
            )
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} in a tensor record")

    def persistent_load(self, pid: Any) -> Any:
        return pid


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def broken_checkpoint(where: str, expected: str, got: str) -> WeightMappingError:
    """The error for anything that is not as the metadata says."""
    return WeightMappingError(
        "a sharded checkpoint is broken",
        where=where,
        expected=expected,
        got=got,
        fix="use a complete checkpoint",
    )
