# SPDX-License-Identifier: Apache-2.0
"""The sample: a conversation and its media, as they lie in a shard.

One sample is a group of tar members with one key; nothing is pickled and media keep their original bytes::

    <key>.json           {"messages": [{"role", "content"}, …], "media": ["image0.jpg", …], "video_fps": [2.0]}
    <key>.image0.jpg     the file as it was
    <key>.video0.mp4     a video file, or its frames in time order: <key>.video0.frame000000.jpg, …
    <key>.audio0.wav

Content is text with the markers ``<image>``, ``<video>``, ``<audio>``. They take the media of their kind in order.
``media`` names every medium once (the frames of a video are ``video0.frames``); ``video_fps`` gives frames per
second where the medium itself cannot (frame folders), None elsewhere; ``"audio_in_video": true`` has the sound of
video files heard.

Shards of LLaVA-Pretrain as the reference writes them (``<key>.jpg`` and a JSON list of turns with from/value) are
read too.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

MediaKind = Literal["image", "video", "audio"]
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: JSON can write it, UTF-8 cannot."""
MARKER = re.compile(r"<(image|video|audio)>")
Role = Literal["system", "user", "assistant"]
ROLE_OF: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg", "ts", "flv", "gif")
AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "m4a", "aac", "opus")
RESERVED = frozenset(
    {"__key__", "__shard__", "__restore_key__", "__sources__", "__subflavors__", "__subflavor__"}
)


class SampleRejected(Exception):  # noqa: N818 - it is an outcome that is counted, not a failure of the program
    """A sample cannot be used. The run goes on; the loader counts it under `reason`.

    Args:
        reason: Short and countable, such as "corrupt image".
        detail: What exactly, for the person who repairs the dataset.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return (type(self), (self.reason, self.detail))


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Medium:
    """One image, video or audio clip, not decoded.

    `data` is the file as it was; a video given as frames holds one file a frame.
    """

    kind: MediaKind
    name: str
    data: tuple[bytes, ...]
    fps: float | None = None
    """Frames per second of a video given as frames; None where the file says it."""
    is_frames: bool = False
    with_sound: bool = False
    """The audio track of a video is heard too, sorted between its frames (families that can)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation with its media, in the order of their markers."""

    key: str
    shard: str
    turns: tuple[Turn, ...]
    media: tuple[Medium, ...] = ()


def parse_sample(members: dict[str, Any], *, strict_roles: bool = True) -> Sample:
    """Turn the raw members of one key into a checked sample.

    Args:
        members: Member suffix → bytes, plus energon's ``__key__`` and ``__shard__``.
        strict_roles: Demand [system] user assistant user assistant … ; off for looking at data only.

    Raises:
        SampleRejected: anything that makes the sample unusable; media are not decoded here.
    """
    key, shard = str(members["__key__"]), str(members.get("__shard__", ""))
    payload = _read_json(members)
    if isinstance(payload, list):
        payload = {"messages": payload}
    if not isinstance(payload, dict):
        raise SampleRejected(
            "bad json", f"expected an object or a list of turns, got {type(payload).__name__}"
        )
    turns = parse_turns(payload.get("messages", payload.get("conversations")))
    if strict_roles:
        check_roles(turns)
    available = _collect_media(members, payload)
    return Sample(key, shard, turns, order_media(turns, available))


def parse_turns(raw: Any) -> tuple[Turn, ...]:
    """Read turns with role/content or from/value.

    Raises:
        SampleRejected: not a list of turns, unknown role, content that is not text, an empty answer.
    """
    if not isinstance(raw, list) or not raw:
        raise SampleRejected("bad json", "no list of messages")
    turns = []
    for index, item in enumerate(raw):
        if not isinstance(item, dict):
            raise SampleRejected("bad json", f"message {index} is not an object")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if role not in ROLE_OF:
            raise SampleRejected("unknown role", f"message {index}: {role!r}")
        if not isinstance(content, str):
            raise SampleRejected("bad json", f"message {index}: content is not text")
        if HALF_PAIR.search(content):
            raise SampleRejected("text is not utf-8", f"message {index} holds half a surrogate pair")
        if ROLE_OF[role] == "assistant" and not content.strip():
            raise SampleRejected("empty answer", f"message {index}")
        turns.append(Turn(ROLE_OF[role], content))
    return tuple(turns)


def check_roles(turns: tuple[Turn, ...]) -> None:
    """Demand an optional system turn, then user and assistant in turn, ending with an answer.

    Raises:
        SampleRejected: another order.
    """
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[0] == "system" else roles
    wanted = ["user", "assistant"] * (len(dialogue) // 2)
    if not dialogue or dialogue != wanted:
        raise SampleRejected("wrong role order", " ".join(roles))


def order_media(turns: tuple[Turn, ...], available: dict[MediaKind, list[Medium]]) -> tuple[Medium, ...]:
    """Give every marker its medium, in reading order.

    Raises:
        SampleRejected: marker count and media count differ, or a marker stands in an answer or system turn.
    """
    rest = {kind: list(media) for kind, media in available.items()}
    ordered = []
    for index, turn in enumerate(turns):
        for found in MARKER.finditer(turn.content):
            kind: Any = found.group(1)
            if turn.role != "user":
                raise SampleRejected("marker outside a user turn", f"message {index}: <{kind}>")
            if not rest.get(kind):
                raise SampleRejected("marker mismatch", f"more <{kind}> markers than media")
            ordered.append(rest[kind].pop(0))
    left = [medium.name for media in rest.values() for medium in media]
    if left:
        raise SampleRejected("marker mismatch", f"media without a marker: {', '.join(left[:3])}")
    return tuple(ordered)


def media_kind(name: str) -> MediaKind | None:
    """Kind of a member by its name: the ``image0.`` prefix first, then the suffix."""
    found = re.match(r"(image|video|audio)\d*\.", name)
    if found:
        return found.group(1)  # pyright: ignore[reportReturnType]
    suffix = name.rsplit(".", 1)[-1].lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "audio" if suffix in AUDIO_SUFFIXES else None


def _read_json(members: dict[str, Any]) -> Any:
    if "json" not in members:
        raise SampleRejected("no json", f"members: {', '.join(sorted(set(members) - RESERVED))}")
    data = members["json"]
    if not isinstance(data, bytes):
        return data
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleRejected("text is not utf-8", str(error)) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise SampleRejected("bad json", str(error)) from None


def _collect_media(members: dict[str, Any], payload: dict[str, Any]) -> dict[MediaKind, list[Medium]]:
    """Media by kind. Named ones come in the order of ``media``; without that list, by member name."""
    names = payload.get("media")
    if names is None:
        names = sorted(
            name for name in members if name not in RESERVED and name != "json" and media_kind(name)
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleRejected("bad json", "`media` is not a list of names")
    found: dict[MediaKind, list[Medium]] = {"image": [], "video": [], "audio": []}
    fps_of = _video_fps(payload, [name for name in names if media_kind(name) == "video"])
    for name in names:
        kind = media_kind(name)
        if kind is None:
            raise SampleRejected("unknown media type", name)
        is_frames = name.endswith(".frames")
        prefix = name.removesuffix("s")  # video0.frames -> video0.frame
        parts = sorted(m for m in members if m.startswith(prefix)) if is_frames else [name]
        if not parts or not all(isinstance(members.get(part), bytes) for part in parts):
            raise SampleRejected("missing media", name)
        data = tuple(members[part] for part in parts)
        with_sound = kind == "video" and not is_frames and payload.get("audio_in_video") is True
        found[kind].append(Medium(kind, name, data, fps_of.get(name), is_frames, with_sound))
    return found


def _video_fps(payload: dict[str, Any], videos: list[str]) -> dict[str, float | None]:
    fps = payload.get("video_fps")
    if fps is None:
        return {}
    usable = isinstance(fps, list) and len(fps) == len(videos)
    if not usable or not all(f is None or (isinstance(f, int | float) and 0 < f < 1000) for f in fps):
        raise SampleRejected(
            "bad json", f"`video_fps` must hold one positive number or null a video: {fps!r:.60}"
        )
    return dict(zip(videos, fps, strict=True))
