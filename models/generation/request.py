# SPDX-License-Identifier: Apache-2.0
"""What is asked: a conversation that ends with a user turn, and its media, not decoded yet."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.contract.architecture import Architecture
from models.contract.errors import ConfigError, DataError
from models.datasets.sample import (
    MARKER,
    MediaKind,
    Medium,
    Sample,
    SampleRejected,
    Turn,
    media_kind,
    order_media,
)

DEFAULT_PROMPT = "Describe the image."
REQUEST_KEYS = frozenset({"key", "prompt", "system", "images", "videos", "audios"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How answers are made."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    seed: int = 0
    """With the key of a request it decides every draw, whatever else is in its batch."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
        )
        for name, value, is_valid, expected in checks:
            if not is_valid:
                raise ConfigError(
                    f"{name} is out of range",
                    where=f"--{name.replace('_', '-')}",
                    expected=expected,
                    got=str(value),
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said to one request."""

    key: str
    text: str
    """Without special tokens."""
    token_ids: tuple[int, ...]
    """New tokens, the end token included."""
    num_prompt_tokens: int
    is_finished: bool
    """False: cut at the limit of new tokens or of the context."""


def request_from_files(
    prompt: str,
    *,
    key: str = "request",
    system: str | None = None,
    images: Sequence[Path] = (),
    videos: Sequence[Path] = (),
    audios: Sequence[Path] = (),
) -> Sample:
    """Make a request from files. A video may be a folder of frames, in the order of their names.

    A prompt without ``<image>``, ``<video>``, ``<audio>`` markers gets them in front, in this order; with markers, they
    take the files of their kind one after the other.

    Raises:
        DataError: a file cannot be read, or markers and files do not match.
    """
    media: dict[MediaKind, list[Medium]] = {
        "image": [_read_file("image", path) for path in images],
        "video": [_read_video(path) for path in videos],
        "audio": [_read_file("audio", path) for path in audios],
    }
    if not MARKER.search(prompt):
        prompt = "".join(f"<{kind}>\n" for kind, files in media.items() for _ in files) + prompt
    turns = (Turn("system", system),) if system else ()
    turns += (Turn("user", prompt),)
    try:
        return Sample(key, "", turns, order_media(turns, media))
    except SampleRejected as error:
        raise DataError("prompt and media do not match", where=key, got=str(error)) from None


def read_requests(file: Path) -> Iterator[Sample]:
    """Read requests from JSON lines: ``{"prompt": …, "images": […], "videos": […], "audios": […], "system": …}``.

    Paths are relative to the file. Raises DataError naming the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("requests cannot be read", where=str(file), got=str(error)) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse_request(line, where=f"{file}:{number}", folder=file.parent, number=number)


def _parse_request(line: str, *, where: str, folder: Path, number: int) -> Sample:
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError("request is not JSON", where=where, got=str(error)) from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or set(data) - REQUEST_KEYS:
        raise DataError(
            "not a request",
            where=where,
            expected=f"an object with prompt, and any of {', '.join(sorted(REQUEST_KEYS))}",
            got=line[:80],
        )
    paths = {name: [folder / path for path in data.get(name, [])] for name in ("images", "videos", "audios")}
    key = str(data.get("key", f"{number:06d}"))
    return request_from_files(data["prompt"], key=key, system=data.get("system"), **paths)


def requests_of_sample(sample: Sample) -> Iterator[tuple[Sample, str, str]]:
    """One request for every answer of a dataset sample, with the true answers before it as history.

    Yields:
        The request (key ``<sample key>#<turn>``), its question without markers, and the truth.
    """
    for index, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        history = sample.turns[:index]
        shown = sum(len(MARKER.findall(earlier.content)) for earlier in history)
        question = MARKER.sub("", history[-1].content).strip()
        yield (
            Sample(f"{sample.key}#{index}", sample.shard, history, sample.media[:shown]),
            question,
            turn.content,
        )


def check_modalities(requests: Iterable[Sample], architecture: Architecture, kinds: Sequence[str]) -> None:
    """Refuse media that the family cannot take.

    Args:
        requests: What is asked.
        architecture: The model.
        kinds: ``MEDIA_KINDS`` of the family's ``data`` module.

    Raises:
        DataError: naming the request, the medium and what the family takes.
    """
    for request in requests:
        for medium in request.media:
            if medium.kind not in kinds:
                raise DataError(
                    f"{architecture.hf_model_type} takes no {medium.kind}",
                    where=f"{request.key}: {medium.name}",
                    expected=f"only {' and '.join(kinds)}",
                    fix="leave it out, or use a checkpoint of a family that takes it",
                )


def check_context(request: Sample, num_prompt_tokens: int, limit: int) -> None:
    """Refuse a prompt that leaves no room for an answer. Raises DataError."""
    if num_prompt_tokens >= limit:
        raise DataError(
            "the prompt is longer than the context",
            where=request.key,
            expected=f"at most {limit - 1} tokens (max_position_embeddings {limit})",
            got=f"{num_prompt_tokens} tokens, vision and audio included",
            fix="shorten it, or give fewer or smaller media",
        )


def _read_file(kind: MediaKind, path: Path) -> Medium:
    try:
        return Medium(kind, str(path), (path.read_bytes(),))
    except OSError as error:
        raise DataError(
            f"{kind} cannot be read", where=str(path), got=error.strerror or str(error), fix="check the path"
        ) from None


def _read_video(path: Path) -> Medium:
    if not path.is_dir():
        return _read_file("video", path)
    frames = sorted(file for file in path.iterdir() if media_kind(file.name) == "image")
    if not frames:
        raise DataError("video folder holds no frames", where=str(path), expected="image files in time order")
    return Medium("video", str(path), tuple(file.read_bytes() for file in frames), None, True)
