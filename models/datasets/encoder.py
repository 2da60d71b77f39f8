# SPDX-License-Identifier: Apache-2.0
"""One raw sample to one sequence: parse, decode, process, tokenize, mask, place. Never raises for a bad sample."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from models.common.processing import load_processor, process_image
from models.common.sequences import EncodedSample, MediaItem, encode_sample, line_run, truncate_sequence
from models.contract.architecture import Architecture
from models.contract.families import family_part
from models.contract.recipe import DataSection
from models.datasets.chat import TokenizedChat, tokenize_chat
from models.datasets.media import decode_audio, decode_image, decode_video, image_size
from models.datasets.sample import Medium, Sample, SampleRejected, parse_sample

CACHE_BYTES = 256 << 20
"""Memory for finished samples in one process; a dataset that fits is encoded once."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A sample that cannot be used."""

    file: str
    key: str
    reason: str
    detail: str = ""
    stops_the_run: bool = False

    def to_dict(self) -> dict[str, str]:
        """As it stands in ``run.json``."""
        return {"file": self.file, "key": self.key, "reason": self.reason, "detail": self.detail}


@dataclass(slots=True)
class SampleEncoder:
    """Everything that turns raw samples of a dataset into sequences of a family. Build it with `make_encoder`."""

    family: ModuleType
    processor: Any
    architecture: Architecture
    data: DataSection
    cache_bytes: int = CACHE_BYTES
    _cache: "OrderedDict[tuple[str, str], EncodedSample]" = field(default_factory=OrderedDict)
    _cached_bytes: int = 0

    @property
    def pad_token(self) -> int:
        """Id of padding."""
        return self.processor.tokenizer.pad_token_id

    def __call__(self, members: dict[str, Any]) -> EncodedSample | Rejection:
        """Encode the raw members of one key; finished samples are kept while they fit into memory."""
        where = _where(members)
        if where in self._cache:
            return self._cache[where]
        outcome = self._guarded(members, self.encode)
        if isinstance(outcome, EncodedSample):
            self._remember(where, outcome)
        return outcome

    def _guarded(
        self, members: dict[str, Any], encode: Callable[[Sample], EncodedSample]
    ) -> EncodedSample | Rejection:
        try:
            if "__unreadable__" in members:
                raise SampleRejected("unreadable tar", members["__unreadable__"])
            return encode(parse_sample(members))
        except SampleRejected as error:
            stops = error.reason == "over length" and self.data.over_length == "error"
            return Rejection(*_where(members), error.reason, error.detail, stops)

    def measure(self, members: dict[str, Any]) -> tuple[int, int] | Rejection:
        """Real tokens and merged vision tokens of a sample, exact, without decoding its images."""
        outcome = self._guarded(members, self.plan)
        return outcome if isinstance(outcome, Rejection) else (outcome.length, outcome.num_vision_tokens)

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a checked sample.

        Raises:
            SampleRejected: undecodable media, text that cannot be used, too long, nothing to learn.
        """
        return self._encode(sample, tuple(self.process(medium) for medium in sample.media))

    def plan(self, sample: Sample) -> EncodedSample:
        """Encode a checked sample as far as its length goes: image tokens are counted, their patches are not made."""
        return self._encode(
            sample, tuple(self._plan(m) if m.kind == "image" else self.process(m) for m in sample.media)
        )

    def tokenize(self, sample: Sample) -> TokenizedChat:
        """Text, token ids and loss mask of a checked sample, one placeholder a media run. Raises SampleRejected."""
        items = tuple(self.process(medium) for medium in sample.media)
        return tokenize_chat(self.processor, sample.turns, items, loss_mask=self.data.loss_mask)

    def _plan(self, medium: Medium) -> MediaItem:
        height, width = image_size(medium.data[0], medium.name)
        try:
            patches = self.processor.image_processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise SampleRejected("refused by the processor", f"{medium.name}: {error}") from None
        count = int(patches) // self.architecture.vision.spatial_merge_size**2
        run = line_run(self.architecture.tokens.image, count)
        return MediaItem(kind="image", text=self.processor.image_token, runs=(run,))

    def _encode(self, sample: Sample, items: tuple[MediaItem, ...]) -> EncodedSample:
        chat = tokenize_chat(self.processor, sample.turns, items, loss_mask=self.data.loss_mask)
        encoded = encode_sample(sample.key, chat.ids, chat.supervised, items, self.architecture.tokens)
        return self._within_limit(encoded)

    def process(self, medium: Medium) -> MediaItem:
        """Decode one medium and run the checkpoint's processor on it."""
        if medium.kind not in self.family.MEDIA_KINDS:
            raise SampleRejected("medium not supported", f"{medium.name}: this family takes no {medium.kind}")
        try:
            item = self._process(medium)
        except ValueError as error:  # how transformers' processors refuse a size
            raise SampleRejected("refused by the processor", f"{medium.name}: {error}") from None
        return _blank(item) if self.data.blank_images else item

    def _process(self, medium: Medium) -> MediaItem:
        if medium.kind == "image":
            image = decode_image(medium.data[0], medium.name)
            return process_image(image, self.processor, self.architecture)
        if medium.kind == "video" and not medium.with_sound:
            return self.family.process_video(decode_video(medium), self.processor, self.architecture)
        if "audio" not in self.family.MEDIA_KINDS:
            raise SampleRejected(
                "medium not supported", f"{medium.name}: this family hears no sound in videos"
            )
        rate = self.processor.feature_extractor.sampling_rate
        sound = decode_audio(medium.data[0], rate, medium.name)
        if medium.kind == "video":
            return self.family.process_video(decode_video(medium), self.processor, self.architecture, sound)
        return self.family.process_audio(sound, self.processor, self.architecture)

    def _within_limit(self, encoded: EncodedSample) -> EncodedSample:
        limit = self.data.seq_length
        if encoded.length <= limit:
            return encoded
        if self.data.over_length == "truncate":
            cut = truncate_sequence(encoded, limit)
            if cut is None:
                raise SampleRejected(
                    "truncation loses media or answer", f"{encoded.length} tokens, limit {limit}"
                )
            return cut
        raise SampleRejected("over length", f"{encoded.length} tokens, limit {limit}")

    def _remember(self, where: tuple[str, str], encoded: EncodedSample) -> None:
        if encoded.nbytes > self.cache_bytes // 8:
            return
        self._cache[where] = encoded
        self._cached_bytes += encoded.nbytes
        while self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes


def _where(members: dict[str, Any]) -> tuple[str, str]:
    return str(members.get("__shard__", "")), str(members["__key__"])


def make_encoder(
    data: DataSection, architecture: Architecture, checkpoint: Path, *, cache_bytes: int = CACHE_BYTES
) -> SampleEncoder:
    """Build the encoder of a recipe's data section for a checkpoint.

    Raises:
        ConfigError: the checkpoint's processor cannot be loaded, or the pixel bounds contradict each other.
    """
    processor = _load_once(checkpoint, architecture, data.preprocessing, data.min_pixels, data.max_pixels)
    family = family_part(architecture.family, "data")
    return SampleEncoder(family, processor, architecture, data, cache_bytes)


def _load_once(checkpoint: Path, architecture: Architecture, *settings: Any) -> Any:
    config = checkpoint / "config.json"
    stamp = config.stat().st_mtime_ns if config.exists() else 0
    return _processors(str(checkpoint), stamp, settings)(architecture)


@lru_cache(maxsize=8)
def _processors(checkpoint: str, stamp: int, settings: tuple[Any, ...]) -> Callable[[Architecture], Any]:
    """Loading a tokenizer takes a second: evaluation builds a loader again and again."""
    loaded: list[Any] = []

    def get(architecture: Architecture) -> Any:
        if not loaded:
            preprocessing, min_pixels, max_pixels = settings
            loaded.append(
                load_processor(
                    Path(checkpoint), architecture.vision,
                    preprocessing=preprocessing, min_pixels=min_pixels, max_pixels=max_pixels,
                )
            )  # fmt: skip
        return loaded[0]

    return get


def _blank(item: MediaItem) -> MediaItem:
    """The same shapes with nothing to see or hear."""
    pixels, features = item.pixel_values, item.input_features
    return replace(
        item,
        pixel_values=None if pixels is None else torch.zeros_like(pixels),
        input_features=None if features is None else torch.zeros_like(features),
    )
