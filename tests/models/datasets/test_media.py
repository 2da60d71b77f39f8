# SPDX-License-Identifier: Apache-2.0
import io
import multiprocessing
import struct
import zlib

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from models.datasets.media import (
    decode_audio,
    decode_image,
    decode_video,
    image_size,
    probe_audio,
    probe_video,
)
from models.datasets.sample import Medium, SampleRejected
from models.datasets.scenes import encode_mp4


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16", "1"])
def test_image_modes_become_rgb(mode):
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    image = Image.new("I;16", (60, 40)) if mode == "I;16" else NOISE.convert(mode)
    assert decode_image(encoded(image, kind)).mode == "RGB"
    assert image_size(encoded(image, kind)) == (40, 60)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt image"),
        (b"hello", "corrupt image"),
        (encoded(NOISE, "JPEG")[:300], "corrupt image"),
        (encoded(NOISE, "PNG")[:-2000], "corrupt image"),
        (png_header(60_000, 60_000), "decompression bomb"),
        (png_header(20_000, 10), "image too narrow"),
    ],
    ids=["empty", "text", "half jpeg", "half png", "bomb", "sliver"],
)
def test_bad_images_are_rejected(data, reason):
    with pytest.raises(SampleRejected) as caught:
        decode_image(data, "x.png")
    assert caught.value.reason == reason


def test_video_file_gives_all_frames_and_its_rate():
    frames = [Image.new("RGB", (64, 48), (i * 30, 0, 0)) for i in range(6)]
    video = decode_video(Medium("video", "v.mp4", (encode_mp4(frames, 3),)))
    assert video.frames.shape == (6, 48, 64, 3)
    assert (video.fps, video.is_sampled) == (3.0, False)


def test_frames_given_one_by_one_are_used_as_they_are():
    data = tuple(encoded(NOISE, "PNG") for _ in range(3))
    video = decode_video(Medium("video", "v.frames", data, 4.0, is_frames=True))
    assert (video.frames.shape[0], video.fps, video.is_sampled) == (3, 4.0, True)
    assert np.array_equal(video.frames[1], np.asarray(NOISE))


@pytest.mark.parametrize("cut", [0, 100, 900])
def test_damaged_videos_are_rejected(cut):
    data = encode_mp4([NOISE] * 4, 2)[:cut]
    with pytest.raises(SampleRejected, match="corrupt video"):
        decode_video(Medium("video", "v.mp4", (data,)))


def test_frames_of_different_sizes_are_rejected():
    data = (encoded(NOISE, "PNG"), encoded(NOISE.resize((30, 30)), "PNG"))
    with pytest.raises(SampleRejected, match="different sizes"):
        decode_video(Medium("video", "v.frames", data, 2.0, is_frames=True))


def tone(rate: int, seconds: float = 0.5, channels: int = 2) -> np.ndarray:
    wave = np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate) * 0.5
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_audio_is_resampled_to_mono(rate):
    stream = io.BytesIO()
    soundfile.write(stream, tone(rate), rate, format="WAV", subtype="FLOAT")
    samples = decode_audio(stream.getvalue(), 16000)
    assert abs(samples.size - 8000) <= 16
    # The tone stays a tone: 440 Hz holds the energy. Worst case measured: 0.999 of it.
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(samples.size))) ** 2
    peak = round(440 * samples.size / 16000)
    assert spectrum[peak - 3 : peak + 4].sum() / spectrum.sum() > 0.99


def test_audio_at_the_right_rate_is_untouched():
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000, channels=1), 16000, format="WAV", subtype="FLOAT")
    assert np.array_equal(decode_audio(stream.getvalue(), 16000), tone(16000, channels=1)[:, 0])


def test_sound_of_a_video_is_read():
    stream = io.BytesIO()
    with av.open(stream, mode="w", format="mp4") as container:
        track = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(16000, 1.0, 1).T, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    assert abs(decode_audio(stream.getvalue(), 16000).size - 16000) < 3000


@pytest.mark.parametrize(
    "data", [b"", b"RIFFxxxxWAVE", encode_mp4([NOISE] * 2, 1)], ids=["empty", "stub", "silent video"]
)
def test_damaged_audio_is_rejected(data):
    with pytest.raises(SampleRejected, match="corrupt audio"):
        decode_audio(data, 16000)


def clip(count: int = 6) -> bytes:
    return encode_mp4([Image.new("RGB", (320, 240), (40 * i, 90, 20)) for i in range(count)], fps=4)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_video_decodes_in_a_worker_forked_after_one_was_decoded():
    """Loader workers are forks; a thread pool that the parent has left in the decoder is dead in them."""
    medium = Medium("video", "v.mp4", (clip(),))
    next(av.open(io.BytesIO(clip())).decode(video=0)).to_ndarray(
        format="rgb24"
    )  # leaves PyAV's own pool behind
    decode_video(medium)
    worker = multiprocessing.get_context("fork").Process(target=decode_video, args=(medium,))
    worker.start()
    worker.join(60)
    if worker.exitcode is None:
        worker.kill()
        worker.join()
    assert worker.exitcode == 0


def test_video_of_one_frame_is_rejected_by_header_and_by_content():
    one = clip(1)
    with pytest.raises(SampleRejected, match=r"video too short: v\.mp4: 1 frame"):
        decode_video(Medium("video", "v.mp4", (one,)))
    with pytest.raises(SampleRejected, match="video too short"):
        probe_video(one, "v.mp4")
    with pytest.raises(SampleRejected, match="video too short"):
        decode_video(Medium("video", "video0.frames", (encoded(Image.new("RGB", (8, 8)), "PNG"),), 2.0, True))


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV")
    return stream.getvalue()


def test_audio_without_samples_is_rejected_by_header_and_by_content():
    empty = wav(np.zeros((0, 2), np.float32))
    for look in (lambda: probe_audio(empty, "a.wav"), lambda: decode_audio(empty, 16000, "a.wav")):
        with pytest.raises(SampleRejected, match=r"corrupt audio: a\.wav: no samples"):
            look()


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_number_of_channels_becomes_one(channels):
    data = wav(np.full((800, channels), 0.25, np.float32))
    assert decode_audio(data, 16000).shape == (800,)


def test_audio_without_channels_says_so():
    data = bytearray(wav(np.zeros((800, 1), np.float32)))
    data[22:24] = b"\0\0"  # the header's number of channels
    for look in (
        lambda: probe_audio(bytes(data), "a.wav"),
        lambda: decode_audio(bytes(data), 16000, "a.wav"),
    ):
        with pytest.raises(SampleRejected, match=r"corrupt audio: a\.wav: no channel"):
            look()


@pytest.mark.parametrize("rate", [8000, 48000])
def test_audio_of_which_resampling_leaves_nothing_is_rejected(rate):
    with pytest.raises(
        SampleRejected, match=rf"corrupt audio: a\.wav: too short: 1 sample\(s\) at {rate} Hz"
    ):
        decode_audio(wav(np.zeros((1, 1), np.float32), rate), 16000, "a.wav")


def test_sound_files_and_videos_pass_the_probe():
    probe_audio(wav(tone(16000)), "a.wav")
    probe_video(clip(), "v.mp4")


@pytest.mark.parametrize("probe", [probe_audio, probe_video])
@pytest.mark.parametrize("data", [b"", b"not media at all", clip()[:200]])
def test_probes_reject_what_is_no_medium(probe, data):
    with pytest.raises(SampleRejected, match="corrupt"):
        probe(data, "x")
