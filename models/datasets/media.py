# SPDX-License-Identifier: Apache-2.0
"""Decode the bytes of one medium, within limits, with kept libraries (Pillow, PyAV, soundfile).

A decoder raises :class:`SampleRejected` for whatever is wrong with the bytes. It never allocates more than the
limits below, whatever a header claims.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
import soundfile
from av.container import InputContainer
from PIL import Image, UnidentifiedImageError

from models.common.processing import DecodedVideo
from models.datasets.sample import Medium, SampleRejected

MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own threshold for a decompression bomb: 512 MB of RGB."""
MAX_IMAGE_SIDE_RATIO = 200
"""The processors refuse longer images."""
MAX_VIDEO_BYTES = 1 << 31
"""Decoded frames of one video, before sampling."""
MAX_AUDIO_SECONDS = 3600.0


def decode_image(data: bytes, name: str = "image") -> Image.Image:
    """Decode an image to RGB.

    Palette, grey, CMYK and 16-bit images are converted; transparency is dropped, as the processors do. EXIF
    rotation is not applied: neither do they.
    """
    with _explained(name):
        image = Image.open(io.BytesIO(data))
        _check_size(image.size, name)
        image.load()
        return image.convert("RGB")
    raise AssertionError("unreachable")


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """Height and width, from the header alone."""
    with _explained(name):
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        _check_size((width, height), name)
        return height, width
    raise AssertionError("unreachable")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleRejected("decompression bomb", f"{name}: {error}") from None
    except UnidentifiedImageError:
        raise SampleRejected("corrupt image", f"{name}: not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:  # what Pillow's plug-ins raise
        raise SampleRejected("corrupt image", f"{name}: {error}") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise SampleRejected("decompression bomb", f"{name}: {width}x{height} pixels")
    if max(size) > MAX_IMAGE_SIDE_RATIO * min(size):
        raise SampleRejected(
            "image too narrow", f"{name}: {width}x{height}, sides differ more than 200 times"
        )


def decode_video(medium: Medium) -> DecodedVideo:
    """Decode all frames of a video file, or of a video given as frames."""
    if medium.is_frames:
        frames = [np.asarray(decode_image(data, medium.name)) for data in medium.data]
        if len({frame.shape for frame in frames}) != 1:
            raise SampleRejected("corrupt video", f"{medium.name}: frames of different sizes")
        # The reference's default for frames without a stated rate.
        return DecodedVideo(np.stack(frames), medium.fps or 2.0, True)
    try:
        with av.open(io.BytesIO(medium.data[0]), mode="r") as container:
            frames, fps = _read_frames(container, medium.name)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise SampleRejected("corrupt video", f"{medium.name}: {error}") from None
    return DecodedVideo(frames, medium.fps or fps, False)


def _read_frames(container: InputContainer, name: str) -> tuple[np.ndarray, float]:
    if not container.streams.video:
        raise SampleRejected("corrupt video", f"{name}: no video stream")
    stream = container.streams.video[0]
    _check_size((stream.codec_context.width or 1, stream.codec_context.height or 1), name)
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise SampleRejected("corrupt video", f"{name}: no frame rate")
    frames: list[np.ndarray] = []
    for frame in container.decode(stream):
        frames.append(frame.to_ndarray(format="rgb24"))
        if len(frames) * frames[0].nbytes > MAX_VIDEO_BYTES:
            raise SampleRejected("video too long", f"{name}: more than {MAX_VIDEO_BYTES >> 20} MiB decoded")
    if not frames:
        raise SampleRejected("corrupt video", f"{name}: no frames")
    if len({frame.shape for frame in frames}) != 1:
        raise SampleRejected("corrupt video", f"{name}: the frame size changes")
    return np.stack(frames), float(rate)


def decode_audio(data: bytes, sampling_rate: int, name: str = "audio") -> np.ndarray:
    """Decode a clip to mono at `sampling_rate`, [n] float32 in -1..1. Channels are averaged.

    soundfile reads WAV, FLAC, OGG and MP3; FFmpeg reads the others. Resampling is FFmpeg's band-limited one.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as clip:
            if clip.frames > MAX_AUDIO_SECONDS * clip.samplerate:
                raise SampleRejected("audio too long", f"{name}: {clip.frames / clip.samplerate:.0f} s")
            samples, rate = clip.read(dtype="float32", always_2d=True), clip.samplerate  # [n, channels]
    except soundfile.LibsndfileError:
        samples, rate = _read_audio(data, name)
    if not samples.size:
        raise SampleRejected("corrupt audio", f"{name}: no samples")
    mono = np.ascontiguousarray(samples.mean(axis=1, dtype=np.float32))
    return mono if rate == sampling_rate else resample(mono, rate, sampling_rate)


def _read_audio(data: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.audio:
                raise SampleRejected("corrupt audio", f"{name}: no audio stream")
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            blocks, length, rate = [], 0, stream.rate
            for frame in container.decode(stream):
                for block in to_float.resample(frame):
                    blocks.append(block.to_ndarray().T)  # [n, channels]
                    length += blocks[-1].shape[0]
                if length > MAX_AUDIO_SECONDS * rate:
                    raise SampleRejected("audio too long", f"{name}: more than {MAX_AUDIO_SECONDS:.0f} s")
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise SampleRejected("corrupt audio", f"{name}: {error}") from None
    if not blocks:
        raise SampleRejected("corrupt audio", f"{name}: no samples")
    return np.concatenate(blocks), rate


def resample(mono: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Band-limited resampling of [n] float32; the result has round-up(n * target / rate) samples or so."""
    frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=target)
    blocks = [block.to_ndarray()[0] for part in (frame, None) for block in resampler.resample(part)]
    return np.concatenate(blocks)
