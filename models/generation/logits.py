# SPDX-License-Identifier: Apache-2.0
"""Logits of our model against transformers' on one fixed multimodal batch, and how far they may be apart.

Each side runs its whole path: media processing, position ids, model. transformers in fp32 is the reference, and our
model in fp32 must reproduce it. In a narrower format two correct programs differ by rounding; there our distance from
the reference is measured against the distance of transformers' own run in that format.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.common.batching import build_batch
from models.datasets.sample import MediaKind, Sample, parse_sample
from models.datasets.scenes import SceneKind, scene_at
from models.generation.megatron_engine import MegatronEngine, encode_prompt
from models.generation.request import requests_of_sample
from models.generation.tokens import pad_token
from models.generation.transformers_engine import TransformersEngine, encode_request, to_model

SCENES: dict[SceneKind, tuple[MediaKind, ...]] = {
    "text": (), "caption": ("image",), "pair": ("image",), "video": ("video",), "audio": ("audio",)
}  # fmt: skip
"""Kinds of scenes in the batch, with the media that each needs."""
MAX_FP32_ERROR = 1e-4
"""Largest difference in fp32, relative to the largest logit. Measured worst case of the tiny checkpoints: 4e-6."""
MAX_ROUNDING_RATIO = 2.0
"""How much farther from the fp32 reference than transformers our narrower run may be. Measured: 0.9 to 1.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRow:
    """One number format's comparison. Errors are relative: the largest to the largest logit, rms to rms."""

    dtype: str
    num_real_tokens: int
    max_error: float
    rms_error: float
    reference_rms_error: float
    """Of transformers in the same number format; 0 in fp32, which is the reference."""
    same_token: float
    """Share of positions where both sides' likeliest token is the same."""
    limit: float
    """What `max_error` (fp32) or `rms_error` (narrower) must not exceed."""
    is_close: bool


def fixed_batch(kinds: Sequence[str]) -> list[Sample]:
    """Always the same requests: one of each kind of drawn scene whose media are among `kinds`."""
    mixes: list[dict[SceneKind, float]] = [
        {kind: 1.0} for kind, media in SCENES.items() if set(media) <= set(kinds)
    ]
    scenes = [scene_at(0, split="val", seed=1, mix=mix) for mix in mixes]
    samples = [parse_sample({"__key__": scene.kind, **scene.members()}) for scene in scenes]
    return [list(requests_of_sample(sample))[-1][0] for sample in samples]


@torch.inference_mode()
def transformers_logits(engine: TransformersEngine, requests: Sequence[Sample]) -> Tensor:
    """Logits [n, v] float32 of every real token, request after request, each run on its own."""
    parts = []
    for request in requests:
        inputs = encode_request(request, engine.processor, blank=False)
        output: Any = engine.model(**{name: to_model(value, engine) for name, value in inputs.items()})
        parts.append(output.logits[0].float().cpu())
    return torch.cat(parts)


@torch.inference_mode()
def megatron_logits(engine: MegatronEngine, requests: Sequence[Sample]) -> Tensor:
    """The same from our model, all requests as one right-padded batch; a padded vocabulary is kept."""
    rows = [encode_prompt(request, engine, blank=False) for request in requests]
    batch = build_batch(rows, pad_token=pad_token(engine.processor), multiple_of=engine.sequence_multiple_of)
    logits = (
        engine.model(dataclasses.replace(batch, labels=None).to(engine.device)).float().cpu()
    )  # [b, s, v]
    return torch.cat([part[: row.length] for part, row in zip(logits, rows, strict=True)])


def compare_logits(
    dtype: str, ours: Tensor, reference: Tensor, same_format: Tensor | None = None
) -> LogitsRow:
    """Measure one number format.

    Args:
        dtype: Its name.
        ours: Logits [n, v'] of our model, v' >= v.
        reference: Those [n, v] of transformers in fp32.
        same_format: Those of transformers in `dtype`; None when that is fp32.
    """
    if len(ours) != len(reference):  # the two sides do not even see the same sequence
        return LogitsRow(
            dtype=dtype, num_real_tokens=len(ours), max_error=float("inf"), rms_error=float("inf"),
            reference_rms_error=0.0, same_token=0.0, limit=0.0, is_close=False,
        )  # fmt: skip
    ours = ours[:, : reference.shape[1]]
    largest = _finite((ours - reference).abs().max() / reference.abs().max())
    rms = _rms_error(ours, reference)
    other = 0.0 if same_format is None else _rms_error(same_format, reference)
    limit = MAX_FP32_ERROR if same_format is None else MAX_ROUNDING_RATIO * other
    return LogitsRow(
        dtype=dtype, num_real_tokens=len(ours), max_error=largest, rms_error=rms, reference_rms_error=other,
        same_token=float((ours.argmax(dim=1) == reference.argmax(dim=1)).float().mean()), limit=limit,
        is_close=(largest if same_format is None else rms) <= limit,
    )  # fmt: skip


def _rms_error(value: Tensor, reference: Tensor) -> float:
    return _finite((value - reference).double().norm() / reference.double().norm())


def _finite(value: Tensor) -> float:
    """NaN as infinity: it is never close."""
    return float(value.nan_to_num(nan=float("inf")))
