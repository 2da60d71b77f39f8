# SPDX-License-Identifier: Apache-2.0
"""Chat tars whose media members are Python pickles: read without executing anything, and write them anew.

The reference keeps ``jpgs`` (list of JPEG bytes), ``mp4s`` or ``videos`` (list of lists of JPEG bytes, the frames),
``mp3s``/``wavs`` (list of encoded clips) as pickles, and ``json`` (turns, or {conversations, second_per_grid_ts}).
DataJuicer's export has the same members.
"""

import io
import json
import pickle
import pickletools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon.flavors.webdataset.config import split_name_re

from models.datasets.sample import Medium, SampleRejected, check_roles, order_media, parse_turns
from models.datasets.shards import RawSample, iter_entries, safe_key

PICKLED = {"jpgs": "image", "imgs": "image", "videos": "video", "mp4s": "video", "mp3s": "audio", "wavs": "audio",
           "audios": "audio"}  # fmt: skip
ALLOWED_OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
})  # fmt: skip
"""What lists of bytes are made of. No opcode here imports, calls or builds an object."""


class _NoGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise SampleRejected("pickle holds more than lists of bytes", f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise SampleRejected("pickle holds more than lists of bytes", "persistent id")


def load_bytes_lists(data: bytes) -> list[Any]:
    """Unpickle a list of bytes, or a list of lists of bytes, and nothing else.

    The opcodes are checked before anything is unpickled, and what comes out is checked again.

    Raises:
        SampleRejected: any other content.
    """
    try:
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name not in ALLOWED_OPCODES:
                raise SampleRejected("pickle holds more than lists of bytes", opcode.name)
        value = _NoGlobals(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, MemoryError) as error:
        raise SampleRejected("corrupt pickle", str(error)) from None
    if not isinstance(value, list) or not all(_is_bytes_or_list(item) for item in value):
        raise SampleRejected("pickle holds more than lists of bytes", type(value).__name__)
    return value


def _is_bytes_or_list(item: Any) -> bool:
    return isinstance(item, bytes) or (
        isinstance(item, list) and all(isinstance(part, bytes) for part in item)
    )


@dataclass(frozen=True, slots=True)
class LegacySample:
    """Where a sample lies in an old tar: its members by suffix, as (offset, size)."""

    tar: Path
    key: str
    members: tuple[tuple[str, int, int], ...]


def list_legacy(tars: list[Path]) -> list[LegacySample]:
    """All samples of old tars.

    Raises:
        DataError: a tar is truncated or a member leaves its folder.
    """
    return [sample for tar in tars for sample in _samples_of(tar)]


def _samples_of(tar: Path) -> Iterator[LegacySample]:
    key, members = None, []
    for entry in iter_entries(tar):
        found = split_name_re.match(entry.name)
        if not found:
            continue
        if found.group(1) != key:
            if key is not None:
                yield LegacySample(tar, key, tuple(members))
            key, members = found.group(1), []
        members.append((found.group(2), entry.offset_data, entry.size))
    if key is not None:
        yield LegacySample(tar, key, tuple(members))


def convert_legacy(entry: LegacySample) -> RawSample:
    """Rewrite one old sample without pickles. Raises SampleRejected."""
    data: dict[str, bytes] = {}
    with entry.tar.open("rb") as stream:
        for suffix, offset, size in entry.members:
            stream.seek(offset)
            data[suffix] = stream.read(size)
    if "json" not in data:
        raise SampleRejected("no json", entry.key)
    try:
        payload = json.loads(data["json"].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SampleRejected("bad json", f"{entry.key}: {error}") from None
    raw_turns = (
        payload.get("conversations", payload.get("messages")) if isinstance(payload, dict) else payload
    )
    turns = parse_turns(raw_turns)
    check_roles(turns)
    media, members, fps = _unpack(data, payload if isinstance(payload, dict) else {})
    order_media(turns, {kind: [m for m in media if m.kind == kind] for kind in ("image", "video", "audio")})
    result: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
        "media": [medium.name for medium in media],
    }
    if fps:
        result["video_fps"] = fps
    key = safe_key(f"{entry.tar.stem}/{entry.key.rsplit('/', 1)[-1]}")
    return RawSample(key, {"json": json.dumps(result, ensure_ascii=False).encode(), **members})


def _unpack(
    data: dict[str, bytes], payload: dict[str, Any]
) -> tuple[list[Medium], dict[str, bytes], list[float | None]]:
    media: list[Medium] = []
    members: dict[str, bytes] = {}
    seconds = payload.get("second_per_grid_ts") or []
    fps: list[float | None] = []
    for suffix, kind in PICKLED.items():
        if suffix not in data:
            continue
        for number, item in enumerate(load_bytes_lists(data[suffix])):
            if isinstance(item, list):
                if kind != "video" or not item:
                    raise SampleRejected("unexpected frames", suffix)
                members |= {f"video{number}.frame{i:06d}.jpg": frame for i, frame in enumerate(item)}
                media.append(Medium("video", f"video{number}.frames", ()))
                # The old second_per_grid_ts is one over the frame rate.
                fps.append(1.0 / float(seconds[number]) if number < len(seconds) and seconds[number] else 2.0)
                continue
            name = f"{kind}{number}.{_suffix(kind, suffix, item)}"
            members[name] = item
            media.append(Medium(kind, name, ()))  # pyright: ignore[reportArgumentType]
            if kind == "video":
                fps.append(None)
    return media, members, fps


def _suffix(kind: str, member: str, data: bytes) -> str:
    if kind == "image":
        return "png" if data.startswith(b"\x89PNG") else "jpg"
    if kind == "video":
        return "mp4"
    return "wav" if data.startswith(b"RIFF") or member == "wavs" else "mp3"


def has_pickles(tar: Path) -> bool:
    """Whether the first samples of a tar have pickled members."""
    with tarfile.open(tar, "r:") as opened:
        names = [entry.name for entry, _ in zip(opened, range(20), strict=False)]
    return any(name.rsplit(".", 1)[-1] in PICKLED for name in names)
