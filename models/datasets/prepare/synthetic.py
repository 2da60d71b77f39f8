# SPDX-License-Identifier: Apache-2.0
"""Synthetic datasets: scenes to learn from, and the two demonstrations of the seeds."""

import io
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
from PIL import Image

from models.datasets.scenes import (
    COLOUR_AUDIO_MIX,
    COLOUR_MIX,
    DEFAULT_MIX,
    Figure,
    SceneKind,
    draw_image,
    encode_jpeg,
    encode_mp4,
    scene_at,
)
from models.datasets.shards import RawSample

Preset = Literal["scenes", "scenes-audio", "colours", "colours-audio", "fake-vl", "fake-omni"]
MIX_OF: dict[str, dict[SceneKind, float]] = {
    "scenes": DEFAULT_MIX,
    "scenes-audio": {**DEFAULT_MIX, "audio": 0.2},
    "colours": COLOUR_MIX,
    "colours-audio": COLOUR_AUDIO_MIX,
}


@dataclass(frozen=True, slots=True)
class ConvertScene:
    """Entry (split, index) to the scene there."""

    preset: Preset
    seed: int

    def __call__(self, entry: tuple[Literal["train", "val"], int]) -> RawSample:
        """Draw one scene."""
        split, index = entry
        if self.preset in ("fake-vl", "fake-omni"):
            return fake_sample(f"{split}-{index:06d}", with_audio=self.preset == "fake-omni")
        scene = scene_at(index, split=split, seed=self.seed, mix=MIX_OF[self.preset])
        return RawSample(scene.key, scene.members())


def fake_sample(key: str, *, with_audio: bool) -> RawSample:
    """What the seeds' demonstrations hold: a system turn, an image and a two-frame video, and for Omni a second round
    with a 48 kHz stereo clip. The same media in every sample.
    """
    image = draw_image(
        [Figure("circle", "red", 420, 300, 140), Figure("bar", "blue", 900, 560, 220)], 876, 1300,
        background=(90, 120, 90), noise=20, seed=1,
    )  # fmt: skip
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>\nWhat do you see? <video>\nDoes anything move?"},
        {"role": "assistant", "content": "A red circle and a blue bar. Nothing moves."},
    ]
    media = {"image0.jpg": encode_jpeg(image), "video0.mp4": encode_mp4([_small(image)] * 2, fps=1)}
    if with_audio:
        messages += [
            {"role": "user", "content": "<audio>\nWhat do you hear?"},
            {"role": "assistant", "content": "Glass breaks."},
        ]
        media["audio0.wav"] = _burst()
    payload = {"messages": messages, "media": list(media)}
    return RawSample(key, {"json": json.dumps(payload).encode(), **media})


def _small(image: Image.Image) -> Image.Image:
    return image.resize((320, 224))


def _burst() -> bytes:
    """Noise that dies away, 1.5 s."""
    rate = 48_000
    noise = (
        np.random.default_rng(7).standard_normal((rate * 3 // 2, 2))
        * np.exp(-np.linspace(0, 8, rate * 3 // 2))[:, None]
    )
    stream = io.BytesIO()
    soundfile.write(stream, (0.2 * noise).clip(-1, 1), rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()
