# SPDX-License-Identifier: Apache-2.0
"""Media of a request, decoded; without their content for control runs."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from models.common.processing import DecodedVideo
from models.contract.errors import DataError
from models.datasets.media import decode_audio, decode_image, decode_video
from models.datasets.sample import Medium, Sample, SampleRejected

DecodedMedium = Image.Image | DecodedVideo | np.ndarray
BLANK_GREY = 128
"""Every pixel of a blanked picture."""


def decode_media(
    request: Sample, processor: Any, *, blank: bool = False
) -> list[tuple[Medium, DecodedMedium]]:
    """Decode the media of a request, in marker order.

    Args:
        request: What is asked.
        processor: The checkpoint's; says the sampling rate of audio.
        blank: Keep shapes and lose content: grey pictures, silent audio.

    Raises:
        DataError: a medium does not decode, with its name and the reason.
    """
    decoded = []
    for medium in request.media:
        try:
            content = _decode(medium, processor)
        except SampleRejected as error:
            raise DataError(
                f"{medium.kind} does not decode: {error.reason}",
                where=request.key,
                got=error.detail or medium.name,
                fix="replace the file",
            ) from None
        decoded.append((medium, _blank(content) if blank else content))
    return decoded


def _decode(medium: Medium, processor: Any) -> DecodedMedium:
    if medium.kind == "image":
        return decode_image(medium.data[0], medium.name)
    if medium.kind == "video":
        return decode_video(medium)
    extractor = processor.feature_extractor
    samples = decode_audio(medium.data[0], extractor.sampling_rate, medium.name)
    needed = extractor.n_fft // 2 + 1  # the first window mirrors half of itself
    if samples.size < needed:
        raise SampleRejected("audio too short", f"{medium.name}: {samples.size} samples, needs {needed}")
    return samples


def _blank(content: DecodedMedium) -> DecodedMedium:
    if isinstance(content, Image.Image):
        return Image.new("RGB", content.size, (BLANK_GREY,) * 3)
    if isinstance(content, DecodedVideo):
        return dataclasses.replace(content, frames=np.full_like(content.frames, BLANK_GREY))
    return np.zeros_like(content)
