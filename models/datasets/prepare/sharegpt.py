# SPDX-License-Identifier: Apache-2.0
"""ShareGPT-style chats with any number of images, videos and audio clips; also {images, messages} records.

    {"id"?, "conversations" | "messages": [...], "images"?, "videos"?, "audios"?: [paths] or "a.jpg,b.jpg", "system"?}

A video is a file, or a folder with its frames in the order of their names; beside such a folder ``<folder>.json``
may say ``{"fps": "2.0"}``. Without it frames are two a second, as the reference takes them.
"""

import json
from dataclasses import dataclass
from typing import Any

from models.datasets.prepare.source import MediaSource, Verify, suffix_of, verify_medium
from models.datasets.sample import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaKind,
    Medium,
    SampleRejected,
    check_roles,
    order_media,
    parse_turns,
)
from models.datasets.shards import RawSample, safe_key

FIELDS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("images", "image"), "video": ("videos", "video"), "audio": ("audios", "audio"),
}  # fmt: skip
DEFAULT_FRAME_FPS = 2.0


@dataclass(frozen=True, slots=True)
class ConvertShareGpt:
    """One chat to a sample."""

    media: MediaSource
    verify: Verify = "header"

    def __call__(self, entry: dict[str, Any]) -> RawSample:
        """Convert. Raises SampleRejected."""
        raw = entry.get("messages", entry.get("conversations"))
        if isinstance(entry.get("system"), str) and entry["system"] and isinstance(raw, list):
            raw = [{"role": "system", "content": entry["system"]}, *raw]
        turns = parse_turns(raw)
        check_roles(turns)
        members: dict[str, bytes] = {}
        names: list[str] = []
        fps: list[float | None] = []
        listed: dict[MediaKind, list[Medium]] = {}
        for kind in FIELDS:
            paths = media_paths(entry, kind)
            listed[kind] = [Medium(kind, path, ()) for path in paths]
            for number, path in enumerate(paths):
                name, rate, files = self._read(kind, number, path)
                members |= files
                names.append(name)
                if kind == "video":
                    fps.append(rate)
        order_media(turns, listed)
        payload: dict[str, Any] = {
            "messages": [{"role": turn.role, "content": turn.content} for turn in turns], "media": names,
        }  # fmt: skip
        if fps:
            payload["video_fps"] = fps
        text = json.dumps(payload, ensure_ascii=False).encode()
        return RawSample(safe_key(str(entry["id"])), {"json": text, **members})

    def _read(self, kind: MediaKind, number: int, path: str) -> tuple[str, float | None, dict[str, bytes]]:
        """Name in the sample, frames per second if known, and the members."""
        suffix = suffix_of(path)
        if kind == "video" and suffix not in VIDEO_SUFFIXES:
            return self._read_frames(number, path)
        allowed = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}[kind]
        if suffix not in allowed:
            raise SampleRejected("unknown media type", path)
        data = self.media.read(path)
        verify_medium(kind, data, path, self.verify)
        name = f"{kind}{number}.{suffix}"
        return name, None, {name: data}

    def _read_frames(self, number: int, folder: str) -> tuple[str, float, dict[str, bytes]]:
        files = [file for file in self.media.list_folder(folder) if suffix_of(file) in IMAGE_SUFFIXES]
        if len(files) == 1:
            raise SampleRejected("video too short", f"{folder}: 1 frame; give it as an image")
        if not files:
            raise SampleRejected(
                "missing media", f"{folder}: no such video file, and no frames in such a folder"
            )
        members = {}
        for index, file in enumerate(files):
            data = self.media.read(file)
            verify_medium("image", data, file, self.verify)
            members[f"video{number}.frame{index:06d}.{suffix_of(file)}"] = data
        return f"video{number}.frames", self._frame_rate(folder), members

    def _frame_rate(self, folder: str) -> float:
        beside = f"{folder.rstrip('/')}.json"
        if not self.media.has(beside):
            return DEFAULT_FRAME_FPS
        try:
            rate = float(json.loads(self.media.read(beside))["fps"])
        except (ValueError, KeyError, TypeError):
            raise SampleRejected("bad frame rate", beside) from None
        if not 0 < rate < 1000:
            raise SampleRejected("bad frame rate", f"{beside}: {rate}")
        return rate


def media_paths(entry: dict[str, Any], kind: MediaKind) -> list[str]:
    """Paths of one kind: a list, one path, or several parted by commas.

    Raises:
        SampleRejected: something else.
    """
    for name in FIELDS[kind]:
        value = entry.get(name)
        if value is None or value == "" or value == []:
            continue
        if isinstance(value, str):
            return [part for part in value.split(",") if part]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
        raise SampleRejected("bad json", f"{name} is not a list of paths")
    return []


def with_ids(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every entry an id of its own: what it says, made unique, or its number."""
    seen: dict[str, int] = {}
    result = []
    for index, entry in enumerate(entries):
        name = safe_key(str(entry.get("id", f"sample-{index:08d}")))
        number = seen.get(name, 0)
        seen[name] = number + 1
        result.append({**entry, "id": f"{name}_{number}" if number else name})
    return result
