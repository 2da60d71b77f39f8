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
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from models.common.processing import DecodedVideo
from models.datasets.sample import Medium, SampleRejected

MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own threshold for a decompression bomb: 512 MB of RGB."""
MAX_IMAGE_SIDE_RATIO = 200
"""The processors refuse longer images."""
MIN_VIDEO_FRAMES = 2
"""A temporal patch of every family; less is an image."""
MAX_VIDEO_BYTES = 1 << 31
"""Decoded frames of one video, before sampling."""
MAX_AUDIO_SECONDS = 3600.0
CHECK_RATE = 16_000
"""At which audio is decoded where only its soundness matters."""


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
        _check_frames(len(medium.data), medium.name)
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
    _check_frames(len(frames), medium.name)
    return DecodedVideo(frames, medium.fps or fps, False)


def probe_video(data: bytes, name: str = "video") -> None:
    """Look at a video file's header: a stream, its size and rate, and more than one frame where it says how many."""
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream, _ = _video_stream(container, name)
            _check_frames(stream.frames or MIN_VIDEO_FRAMES, name)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise SampleRejected("corrupt video", f"{name}: {error}") from None


def _check_frames(count: int, name: str) -> None:
    if count < MIN_VIDEO_FRAMES:
        raise SampleRejected(
            "video too short", f"{name}: {count} frame(s), needs {MIN_VIDEO_FRAMES}; give it as an image"
        )


def _video_stream(container: InputContainer, name: str) -> tuple[VideoStream, float]:
    if not container.streams.video:
        raise SampleRejected("corrupt video", f"{name}: no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise SampleRejected("corrupt video", f"{name}: unknown codec")
    _check_size((stream.codec_context.width or 1, stream.codec_context.height or 1), name)
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise SampleRejected("corrupt video", f"{name}: no frame rate")
    return stream, float(rate)


def _read_frames(container: InputContainer, name: str) -> tuple[np.ndarray, float]:
    stream, rate = _video_stream(container, name)
    frames: list[np.ndarray] = []
    # One of our own, in one thread: PyAV keeps one a thread with a pool of threads, which a forked loader worker
    # inherits without its threads and waits for, for ever.
    reformatter = VideoReformatter()
    for frame in container.decode(stream):
        frames.append(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        if len(frames) * frames[0].nbytes > MAX_VIDEO_BYTES:
            raise SampleRejected("video too long", f"{name}: more than {MAX_VIDEO_BYTES >> 20} MiB decoded")
    if not frames:
        raise SampleRejected("corrupt video", f"{name}: no frames")
    if len({frame.shape for frame in frames}) != 1:
        raise SampleRejected("corrupt video", f"{name}: the frame size changes")
    return np.stack(frames), rate


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
    if rate == sampling_rate:
        return mono
    resampled = resample(mono, rate, sampling_rate)
    if not resampled.size:
        raise SampleRejected("corrupt audio", f"{name}: too short: {mono.size} sample(s) at {rate} Hz")
    return resampled


def probe_audio(data: bytes, name: str = "audio") -> None:
    """Look at a clip's header: samples, a channel, and not too many seconds. What soundfile cannot read is decoded."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as clip:
            if not clip.frames or not clip.channels:
                raise SampleRejected("corrupt audio", f"{name}: no samples")
            if clip.frames > MAX_AUDIO_SECONDS * clip.samplerate:
                raise SampleRejected("audio too long", f"{name}: {clip.frames / clip.samplerate:.0f} s")
    except soundfile.LibsndfileError:
        _read_audio(data, name)


def _read_audio(data: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.audio:
                raise SampleRejected("corrupt audio", f"{name}: no audio stream")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise SampleRejected("corrupt audio", f"{name}: unknown codec")
            if not stream.codec_context.channels:
                raise SampleRejected("corrupt audio", f"{name}: no channel, needs one or more")
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


def decode_medium(medium: Medium) -> None:
    """Decode a medium and drop it. Raises SampleRejected."""
    if medium.kind == "image":
        decode_image(medium.data[0], medium.name)
    elif medium.kind == "video":
        decode_video(medium)
    else:
        decode_audio(medium.data[0], CHECK_RATE, medium.name)


def resample(mono: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Band-limited resampling of [n] float32; round-up(n * target / rate) samples or so, none of very few."""
    frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=target)
    blocks = [block.to_ndarray()[0] for part in (frame, None) for block in resampler.resample(part)]
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)
