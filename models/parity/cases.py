# SPDX-License-Identifier: Apache-2.0
"""Micro-batches for comparisons: random tokens and pixels, laid out as the families lay out media."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.common.audio import TOKENS_PER_CHUNK, tokens_after_convolutions
from models.common.batch import IGNORED_LABEL, Batch

IMAGE, VIDEO, AUDIO = 1, 2, 3
KINDS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
"""Token types as transformers numbers them in `mm_token_type_ids`."""
VISION_ENDS = ("vision_start_token_id", "vision_end_token_id")
Piece = tuple[str, Any]
"""("text", number of tokens), ("image", (t, h, w)) or ("video", (t, h, w)) with grids in patches, or ("audio", number
of mel frames)."""

CASES: dict[str, tuple[tuple[Piece, ...], ...]] = {
    "text": ((("text", 13),), (("text", 9),)),
    "image": ((("text", 4), ("image", (1, 4, 6)), ("text", 7)),),
    "images": (
        (("text", 2), ("image", (1, 10, 4)), ("text", 3), ("image", (1, 2, 2)), ("text", 5)),
        (("text", 3), ("image", (1, 6, 14)), ("text", 4)),
    ),
    "video": ((("text", 3), ("video", (3, 4, 6)), ("text", 6)),),
    "mixed": (
        (("text", 2), ("video", (4, 2, 6)), ("text", 3), ("image", (1, 6, 4)), ("text", 4)),
        (("text", 11),),
        (("image", (1, 4, 8)), ("text", 6)),
    ),
    "one token": ((("text", 1),), (("text", 2), ("image", (1, 4, 6)), ("text", 5)), (("text", 1),)),
    "media at the end": (
        (("text", 7),),
        (("text", 1),),
        (("text", 4), ("image", (1, 4, 4)), ("text", 3), ("video", (3, 4, 6))),
    ),
}

AUDIO_CASES: dict[str, tuple[tuple[Piece, ...], ...]] = {
    "audio": ((("text", 3), ("audio", 137), ("text", 5)),),
    "short audio": ((("text", 2), ("audio", 9), ("text", 6)), (("audio", 70), ("text", 4))),
    "audios": (
        (("audio", 451), ("text", 4), ("audio", 30), ("text", 6)),
        (("text", 5), ("audio", 200), ("text", 3)),
    ),
    "audio and vision": (
        (("text", 2), ("video", (3, 4, 6)), ("text", 3), ("audio", 120), ("text", 4)),
        (("text", 9),),
        (("audio", 64), ("text", 2), ("image", (1, 4, 8)), ("text", 6)),
    ),
    "audio at the end": ((("text", 1),), (("text", 6), ("image", (1, 4, 4)), ("text", 3), ("audio", 1))),
}
"""Cases for models with an audio tower, beside :data:`CASES`."""


@dataclass(frozen=True, slots=True)
class Case:
    """The same micro-batch for both sides."""

    batch: Batch
    hf_inputs: dict[str, Tensor]


def make_case(
    name: str, model: PreTrainedModel, *, splits_videos: bool, seed: int = 0, multiple: int = 1
) -> Case:
    """Draw a micro-batch.

    Args:
        name: A key of :data:`CASES`.
        model: The transformers model; gives token ids, sizes and positions.
        splits_videos: Frames of a video stand apart, text between them.
        seed: Of tokens, pixels and labels.
        multiple: Pad rows to a multiple of this.
    """
    generator = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config
    samples = (CASES | AUDIO_CASES)[name]
    rows = [_Row(config, splits_videos, generator) for _ in samples]
    for row, pieces in zip(rows, samples, strict=True):
        for kind, what in pieces:
            row.add(kind, what)
    length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    input_ids = torch.stack([_padded(row.ids, length, 0) for row in rows])
    kinds = torch.stack([_padded(row.kinds, length, 0) for row in rows])
    mask = torch.stack([_padded([1] * len(row.ids), length, 0) for row in rows])
    labels = _labels(input_ids, kinds, mask, generator)
    items = [item for row in rows for item in row.items]
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = [torch.randn(t * h * w, patch_dim, generator=generator) for _, (t, h, w) in items]
    hf_inputs = {"input_ids": input_ids, "attention_mask": mask}
    for kind, pixel_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        chosen = [index for index, (item_kind, _) in enumerate(items) if item_kind == kind]
        if chosen:
            hf_inputs[pixel_name] = torch.cat([pixels[index] for index in chosen])
            hf_inputs[f"{kind}_grid_thw"] = torch.tensor([items[index][1] for index in chosen])
    clips = [
        torch.randn(config.audio_config.num_mel_bins, frames, generator=generator)
        for row in rows
        for frames in row.clips
    ]
    if clips:
        hf_inputs |= _padded_clips(clips)
    if hasattr(config, "audio_config"):  # positions from its own clock; knows no token types
        hf_inputs["position_ids"] = _omni_positions(model, hf_inputs)
    else:
        hf_inputs["mm_token_type_ids"] = kinds
        positions = {key: value for key, value in hf_inputs.items() if not key.startswith("pixel")}
        base: Any = model.base_model
        hf_inputs["position_ids"], _ = base.get_rope_index(**positions)
    batch = Batch(
        input_ids=input_ids,
        position_ids=hf_inputs["position_ids"],
        labels=labels,
        pixel_values=torch.cat(pixels) if items else None,
        grid_thw=torch.tensor([grid for _, grid in items]) if items else None,
        vision_positions=_places(kinds, IMAGE, VIDEO) if items else None,
        input_features=torch.cat(clips, dim=1) if clips else None,
        audio_lengths=torch.tensor([clip.shape[1] for clip in clips]) if clips else None,
        audio_positions=_places(kinds, AUDIO) if clips else None,
        sample_lengths=tuple(len(row.ids) for row in rows),
        num_real_tokens=int(mask.sum()),
        num_supervised_tokens=int((labels != IGNORED_LABEL).sum()),
    )
    return Case(batch, hf_inputs)


def _places(kinds: Tensor, *wanted: int) -> Tensor:
    return torch.isin(kinds.flatten(), torch.tensor(wanted)).nonzero().flatten()


def _padded_clips(clips: list[Tensor]) -> dict[str, Tensor]:
    longest = max(clip.shape[1] for clip in clips)
    padded = [torch.nn.functional.pad(clip, (0, longest - clip.shape[1])) for clip in clips]
    mask = torch.stack([_padded([1] * clip.shape[1], longest, 0) for clip in clips])
    return {"input_features": torch.stack(padded), "feature_attention_mask": mask}


def _omni_positions(model: Any, hf_inputs: dict[str, Tensor]) -> Tensor:
    mask = hf_inputs.get("feature_attention_mask")
    videos = hf_inputs.get("video_grid_thw")
    positions, _ = model.get_rope_index(
        hf_inputs["input_ids"],
        hf_inputs.get("image_grid_thw"),
        videos,
        hf_inputs["attention_mask"],
        use_audio_in_video=False,
        audio_seqlens=None if mask is None else mask.sum(dim=1),
        second_per_grids=None if videos is None else torch.ones(len(videos)),
    )
    return positions


class _Row:
    """One sample while it is put together."""

    def __init__(self, config: Any, splits_videos: bool, generator: torch.Generator) -> None:
        self.config, self.splits_videos, self.generator = config, splits_videos, generator
        self.ids: list[int] = []
        self.kinds: list[int] = []
        self.items: list[tuple[str, tuple[int, int, int]]] = []
        self.clips: list[int] = []

    def add(self, kind: str, what: Any) -> None:
        """Append a piece."""
        if kind == "text":
            self._text(torch.randint(1, 140, (what,), generator=self.generator).tolist())
            return
        if kind == "audio":
            self.clips.append(what)
            tokens = int(tokens_after_convolutions(np.array(what % 100))) + what // 100 * TOKENS_PER_CHUNK
            self._media("audio", tokens, ("audio_start_token_id", "audio_end_token_id"))
            return
        self.items.append((kind, what))
        frames, height, width = what
        tokens = height * width // self.config.vision_config.spatial_merge_size**2
        if kind == "video" and self.splits_videos:
            for _ in range(frames):
                self._text(torch.randint(1, 140, (2,), generator=self.generator).tolist())
                self._media(kind, tokens)
        else:
            self._media(kind, frames * tokens)

    def _text(self, ids: list[int]) -> None:
        self.ids += ids
        self.kinds += [0] * len(ids)

    def _media(self, kind: str, tokens: int, ends: tuple[str, str] = VISION_ENDS) -> None:
        self._text([getattr(self.config, ends[0])])
        self.ids += [getattr(self.config, f"{kind}_token_id")] * tokens
        self.kinds += [KINDS[kind]] * tokens
        self._text([getattr(self.config, ends[1])])


def _padded(values: list[int], length: int, filling: int) -> Tensor:
    return torch.tensor(values + [filling] * (length - len(values)))


def _labels(input_ids: Tensor, kinds: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Next tokens, two thirds of the text ones; the rest ignored."""
    kept = (torch.rand(input_ids.shape, generator=generator) < 0.67) & (mask == 1) & (kinds == 0)
    targets = torch.where(kept, input_ids, IGNORED_LABEL)
    return torch.nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED_LABEL)


def packed_positions(batch: Batch, *, multiple: int = 1) -> Tensor:
    """Index into the flattened b*s of every position that :func:`pack` keeps, [s]."""
    width = batch.input_ids.shape[1]
    lengths = [-(-length // multiple) * multiple for length in batch.sample_lengths]
    return torch.cat([row * width + torch.arange(length) for row, length in enumerate(lengths)])


def pack(batch: Batch, *, multiple: int = 1) -> Batch:
    """The same samples as one packed row, each padded to `multiple`."""
    lengths = [-(-length // multiple) * multiple for length in batch.sample_lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    keep = packed_positions(batch, multiple=multiple)
    new_place = torch.full((batch.input_ids.numel(),), -1).scatter(0, keep, torch.arange(len(keep)))
    assert batch.labels is not None
    return Batch(
        input_ids=batch.input_ids.flatten()[keep][None],
        position_ids=batch.position_ids.flatten(1)[:, keep][:, None],
        labels=batch.labels.flatten()[keep][None],
        pixel_values=batch.pixel_values,
        grid_thw=batch.grid_thw,
        vision_positions=None if batch.vision_positions is None else new_place[batch.vision_positions],
        input_features=batch.input_features,
        audio_lengths=batch.audio_lengths,
        audio_positions=None if batch.audio_positions is None else new_place[batch.audio_positions],
        cu_seqlens=bounds.int(),
        max_seqlen=max(lengths),
        sample_lengths=batch.sample_lengths,
        num_real_tokens=batch.num_real_tokens,
        num_supervised_tokens=batch.num_supervised_tokens,
    )
