# SPDX-License-Identifier: Apache-2.0
"""Where prepared samples come from: JSON lists, and media in a folder or a zip file."""

import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from models.contract.errors import DataError
from models.datasets.media import decode_medium, image_size, probe_audio, probe_video
from models.datasets.sample import HALF_PAIR, MediaKind, Medium, SampleRejected

Verify = Literal["none", "header", "decode"]
MAX_MEDIA_BYTES = 1 << 31
"""Of one file, unpacked: a zip of zeros claims any size."""
PROBE = 200
"""Media looked up before a job starts: when none is there, it is another dataset's."""


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Media by relative name, in a folder or in a zip file. Names may not leave it."""

    root: Path

    def read(self, name: str) -> bytes:
        """Bytes of one file.

        Raises:
            SampleRejected: missing, empty, or outside of the source.
        """
        checked = self._checked(name)
        try:
            data = self._read(checked)
        except (KeyError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise SampleRejected("missing media", name) from None
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
        ) as error:  # RuntimeError: encrypted
            raise SampleRejected("unreadable media", f"{name}: {error}") from None
        if not data:
            raise SampleRejected("empty media", name)
        return data

    def _read(self, checked: str) -> bytes:
        is_zip = self.root.is_file()
        size = (
            _archive(self.root).getinfo(checked).file_size if is_zip else (self.root / checked).stat().st_size
        )
        if size > MAX_MEDIA_BYTES:
            raise SampleRejected("media too large", f"{checked}: {size} bytes, at most {MAX_MEDIA_BYTES}")
        return _archive(self.root).read(checked) if is_zip else (self.root / checked).read_bytes()

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        try:
            checked = self._checked(name)
            return checked in _names(self.root) if self.root.is_file() else (self.root / checked).exists()
        except (SampleRejected, OSError):  # a name that leads out, or one that no file system takes
            return False

    def list_folder(self, name: str) -> list[str]:
        """Names of the files of a sub-folder, sorted."""
        folder = self._checked(name)
        if self.root.is_file():
            return sorted(
                file for file in _names(self.root) if file.startswith(f"{folder}/") and file[-1] != "/"
            )
        return sorted(f"{folder}/{path.name}" for path in (self.root / folder).glob("*") if path.is_file())

    def _checked(self, name: str) -> str:
        clean = name.replace("\\", "/").removeprefix("./")
        if HALF_PAIR.search(clean):
            raise SampleRejected("text is not utf-8", f"name of a medium: {name!r}")
        if not clean or clean.startswith("/") or ".." in clean.split("/") or "\0" in clean:
            raise SampleRejected("path leaves the dataset", name)
        if not self.root.is_file() and not (self.root / clean).resolve().is_relative_to(self.root.resolve()):
            raise SampleRejected("path leaves the dataset", f"{name} is a link out of it")
        return clean


@lru_cache(maxsize=4)
def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError("not a zip file", where=str(path), got=str(error), fix="download it again") from None


@lru_cache(maxsize=4)
def _names(path: Path) -> frozenset[str]:
    return frozenset(_archive(path).namelist())


def open_source(root: Path) -> MediaSource:
    """Open a folder or zip file of media. Raises DataError if it is neither."""
    if not root.exists():
        raise DataError("media not found", where=str(root), expected="a folder or a zip file")
    if root.is_file():
        _archive(root)
    return MediaSource(root)


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of objects, or JSON lines.

    Raises:
        DataError: missing, not JSON, not UTF-8, or something else than a list of objects.
    """
    if not path.is_file():
        raise DataError("annotations not found", where=str(path), expected="a .json or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
        data = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else None
        )
        data = json.loads(text) if data is None else data
    except UnicodeDecodeError as error:
        raise DataError("annotations are not UTF-8", where=str(path), got=str(error)) from None
    except json.JSONDecodeError as error:
        raise DataError("annotations are not JSON", where=str(path), got=str(error)) from None
    if not isinstance(data, list) or not data or not all(isinstance(item, dict) for item in data):
        raise DataError("annotations are not a list of objects", where=str(path), got=type(data).__name__)
    return data


def check_overlap(source: MediaSource, names: Iterable[str], *, where: str) -> None:
    """Refuse to start when none of the first media is there: another dataset's zip or folder.

    Raises:
        DataError: none found.
    """
    looked = 0
    example = ""
    for name, _ in zip(names, range(PROBE), strict=False):
        looked, example = looked + 1, example or name
        try:
            if source.has(name):
                return
        except SampleRejected:
            continue
    if looked:
        raise DataError(
            "the media do not belong to these annotations", where=f"{where} with {source.root}",
            expected=f"{example} and the like", got=f"none of the first {looked} files that are named",
            fix="check the media folder or zip, and from where the names in the annotations count",
        )  # fmt: skip


PROBES = {"image": image_size, "video": probe_video, "audio": probe_audio}


def verify_medium(kind: MediaKind, data: bytes, name: str, verify: Verify) -> None:
    """Look at one file as closely as asked.

    Raises:
        SampleRejected: of another kind, of a size no model takes, or (with `decode`) damaged.
    """
    if verify == "header":
        PROBES[kind](data, name)
    elif verify == "decode":
        decode_medium(Medium(kind, name, (data,)))


def suffix_of(name: str) -> str:
    """Lower-case file suffix without its dot."""
    return Path(name).suffix.lower().removeprefix(".") or "bin"
