# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes: coloured shapes whose questions can only be answered by looking.

Every scene follows from (seed, split, index) alone. Train and validation never share a scene: a scene's
description is hashed, and the hash says which split may use it.
"""

import hashlib
import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 205, 40),
    "purple": (132, 54, 184),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "bar")
NUMBERS = ("zero", "one", "two", "three")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SIZES = ((56, 56), (56, 84), (84, 56), (84, 84), (112, 56), (112, 84), (112, 112))
"""Height and width in pixels: one to sixteen merged vision tokens for patches of 14 or 16."""
VIDEO_SIZE, VIDEO_FRAMES, VIDEO_FPS = 56, 8, 4
SAMPLE_RATE = 16000
VALIDATION_SHARE = 16
"""One scene in sixteen belongs to validation."""

SceneKind = Literal[
    "caption", "question", "pair", "count", "video", "text", "audio", "colour", "colours", "clip", "choice", "pitch"
]  # fmt: skip
DEFAULT_MIX: dict[SceneKind, float] = {
    "caption": 0.3, "question": 0.3, "pair": 0.08, "count": 0.1, "video": 0.12, "text": 0.1,
}  # fmt: skip
COLOUR_MIX: dict[SceneKind, float] = {"colour": 0.6, "colours": 0.25, "clip": 0.05, "choice": 0.1}
"""Colours alone: what a tiny model learns from random weights within a hundred steps, so that a 500-step curve ends on
its floor whatever the rounding. Shapes, places, counts and which of two images was meant it learns late and at times
that rounding decides."""
COLOUR_AUDIO_MIX: dict[SceneKind, float] = {
    "colour": 0.55, "colours": 0.2, "clip": 0.05, "choice": 0.1, "pitch": 0.1,
}  # fmt: skip
"""The same with sounds that are told apart as early as colours."""
SENTENCES = (
    "It is {}.", "I see {}.", "That one is {}.", "The shape is {}.", "Here is something {}.", "Clearly {}.",
)  # fmt: skip
"""Which one is said cannot be known: the loss keeps a floor that curves can be compared on."""
SYSTEM = "You look closely and answer in few words."


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape: its centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A finished sample: turns with markers, media as encoded files by member name, in marker order."""

    key: str
    kind: SceneKind
    messages: tuple[dict[str, str], ...]
    media: dict[str, bytes]

    def members(self) -> dict[str, bytes]:
        """Tar members of this sample, by suffix."""
        payload = {"messages": list(self.messages), "media": list(self.media), "kind": self.kind}
        return {"json": json.dumps(payload, ensure_ascii=False).encode(), **self.media}


def iter_scenes(
    count: int, *, split: Literal["train", "val"], seed: int = 0, mix: dict[SceneKind, float] | None = None
) -> Iterator[Scene]:
    """Yield `count` scenes of a split, always the same ones for the same arguments.

    Args:
        count: Scenes to make.
        split: Scenes of the two splits are disjoint whatever the seeds.
        seed: Another seed gives other scenes.
        mix: Share of each kind; the default has no audio.
    """
    for index in range(count):
        yield scene_at(index, split=split, seed=seed, mix=mix)


def scene_at(
    index: int, *, split: Literal["train", "val"], seed: int = 0, mix: dict[SceneKind, float] | None = None
) -> Scene:
    """The scene at `index` of a split; see `iter_scenes`."""
    weights = mix or DEFAULT_MIX
    key, name = f"{split}-{index:06d}", f"{seed}:{split}:{index}"
    for attempt in range(10_000):
        rng = random.Random(f"{name}:{attempt}")
        kind = rng.choices(list(weights), weights=list(weights.values()))[0]
        messages, description, draw = BUILDERS[kind](rng)
        digest = hashlib.sha256(f"{kind}:{description}".encode()).digest()
        if (digest[0] % VALIDATION_SHARE == 0) == (split == "val"):
            return Scene(key, kind, tuple(messages), draw())
    raise AssertionError("no scene of this split in 10,000 attempts")


def draw_image(figures: list[Figure], height: int, width: int, *, background: tuple[int, int, int], noise: int,
               seed: int) -> Image.Image:  # fmt: skip
    """Draw shapes on a plain (noise 0) or noisy background, RGB."""
    pixels = np.full((height, width, 3), background, dtype=np.int16)
    if noise:
        pixels += np.random.default_rng(seed).integers(-noise, noise + 1, (height, width, 1), dtype=np.int16)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for figure in figures:
        _draw_figure(canvas, figure)
    return image


def _draw_figure(canvas: ImageDraw.ImageDraw, figure: Figure) -> None:
    x, y, r, fill = figure.x, figure.y, figure.radius, COLOURS[figure.colour]
    if figure.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif figure.shape == "square":
        canvas.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif figure.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
    else:
        canvas.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=fill)


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG bytes at quality 92."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=92)
    return stream.getvalue()


def encode_mp4(frames: list[Image.Image], fps: int) -> bytes:
    """MPEG-4 bytes; even sides."""
    stream = io.BytesIO()
    with av.open(stream, mode="w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=fps)
        track.width, track.height, track.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        track.bit_rate, track.thread_count = 400_000, 1
        track.time_base = Fraction(1, fps)
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_image(frame)))
        container.mux(track.encode())
    return stream.getvalue()


def _canvas(rng: random.Random) -> tuple[int, int, tuple[int, int, int], int, int]:
    height, width = rng.choice(SIZES)
    grey = rng.randint(60, 130)
    return height, width, (grey, grey, grey), rng.choice((0, 0, 25)), rng.randrange(2**31)


def _render(canvas: tuple[int, int, tuple[int, int, int], int, int], figures: list[Figure]) -> bytes:
    height, width, background, noise, seed = canvas
    return encode_jpeg(draw_image(figures, height, width, background=background, noise=noise, seed=seed))


def _single(rng: random.Random, height: int, width: int) -> tuple[Figure, str]:
    """A figure and the word for where it is, along the longer axis (or both)."""
    radius = rng.uniform(0.2, 0.3) * min(height, width)
    column, row = rng.choice(("left", "right")), rng.choice(("top", "bottom"))
    x = width * (0.3 if column == "left" else 0.7)
    y = height * (0.3 if row == "top" else 0.7)
    figure = Figure(rng.choice(SHAPES), rng.choice(list(COLOURS)), round(x, 1), round(y, 1), round(radius, 1))
    return figure, f"{row} {column}"


def _turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def _caption(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    canvas = _canvas(rng)
    figure, where = _single(rng, canvas[0], canvas[1])
    ask = rng.choice(("Describe the image.", "What is shown?", "Write a short caption."))
    messages = _turns(f"<image>\n{ask}", f"A {figure.colour} {figure.shape} at the {where}.")
    if rng.random() < 0.2:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    return messages, f"{canvas}{figure}{ask}", lambda: {"image0.jpg": _render(canvas, [figure])}


def _question(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    canvas = _canvas(rng)
    figure, where = _single(rng, canvas[0], canvas[1])
    asked = [
        ("What colour is the shape?", figure.colour),
        ("Which shape is it?", figure.shape),
        ("Where is it?", where),
    ]
    rng.shuffle(asked)
    asked = asked[: rng.choice((1, 2, 3))]
    texts = [text for question, answer in asked for text in (question, answer)]
    texts[0] = f"<image>\n{texts[0]}" if rng.random() < 0.7 else f"{texts[0]}\n<image>"
    return _turns(*texts), f"{canvas}{figure}{texts}", lambda: {"image0.jpg": _render(canvas, [figure])}


def _pair(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    canvases = (_canvas(rng), _canvas(rng))
    figures = [_single(rng, canvas[0], canvas[1])[0] for canvas in canvases]
    texts = (
        "First image: <image>\nSecond image: <image>\nWhich colours are they?",
        f"{figures[0].colour} and {figures[1].colour}",
        "Do they show the same shape?",
        "yes" if figures[0].shape == figures[1].shape else "no",
    )
    draw = lambda: {  # noqa: E731 - drawn only when the scene is kept
        f"image{i}.jpg": _render(canvas, [figure])
        for i, (canvas, figure) in enumerate(zip(canvases, figures, strict=True))
    }
    return _turns(*texts), f"{canvases}{figures}", draw


def _count(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    canvas = _canvas(rng)
    height, width = canvas[:2]
    spots = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    number, colour, shape = rng.randint(1, 3), rng.choice(list(COLOURS)), rng.choice(SHAPES)
    radius = round(0.17 * min(height, width), 1)
    figures = [Figure(shape, colour, width * x, height * y, radius) for x, y in rng.sample(spots, number)]
    plural = "s" if number > 1 else ""
    texts = ("<image>\nHow many shapes are there?", f"{NUMBERS[number]} {colour} {shape}{plural}")
    return _turns(*texts), f"{canvas}{figures}", lambda: {"image0.jpg": _render(canvas, figures)}


def _video(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    direction = rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    colour, shape, grey = rng.choice(list(COLOURS)), rng.choice(SHAPES[:3]), rng.randint(60, 130)
    across, radius = rng.uniform(0.35, 0.65), rng.uniform(8, 12)

    def frame(step: int) -> Image.Image:
        along = 0.22 + 0.56 * step / (VIDEO_FRAMES - 1)
        along = along if dx + dy > 0 else 1 - along
        x, y = (along, across) if dx else (across, along)
        figure = Figure(shape, colour, x * VIDEO_SIZE, y * VIDEO_SIZE, radius)
        return draw_image([figure], VIDEO_SIZE, VIDEO_SIZE, background=(grey, grey, grey), noise=0, seed=0)

    texts = ("<video>\nWhere does it move?", f"The {colour} {shape} moves {direction}.")
    described = f"{direction}{colour}{shape}{grey}{across:.3f}{radius:.2f}"
    return (
        _turns(*texts),
        described,
        lambda: {"video0.mp4": encode_mp4([frame(i) for i in range(VIDEO_FRAMES)], VIDEO_FPS)},
    )


def _text(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    words = [rng.choice(list(COLOURS)) for _ in range(3)] + [rng.choice(SHAPES)]
    backwards = rng.random() < 0.3
    ask = "Say backwards" if backwards else "Repeat"
    answer = " ".join(reversed(words)) if backwards else " ".join(words)
    return _turns(f"{ask}: {' '.join(words)}", answer), f"{ask}{words}", dict


def _sentence(rng: random.Random, colours: str) -> tuple[str, str]:
    return "Say it in a sentence.", rng.choice(SENTENCES).format(colours)


def _colour(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    canvas = _canvas(rng)
    figure, _ = _single(rng, canvas[0], canvas[1])
    texts = ("<image>\nWhat colour is the shape?", figure.colour, *_sentence(rng, figure.colour))
    return _turns(*texts), f"{canvas}{figure}{texts}", lambda: {"image0.jpg": _render(canvas, [figure])}


def _colours(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    canvases = (_canvas(rng), _canvas(rng))
    figures = [_single(rng, canvas[0], canvas[1])[0] for canvas in canvases]
    first, second = (figure.colour for figure in figures)
    texts = ("<image>\nWhat colour?", first, "<image>\nWhat colour?", second, *_sentence(rng, second))
    draw = lambda: {  # noqa: E731 - drawn only when the scene is kept
        f"image{i}.jpg": _render(canvas, [figure])
        for i, (canvas, figure) in enumerate(zip(canvases, figures, strict=True))
    }
    return _turns(*texts), f"{canvases}{figures}{texts}", draw


def _clip(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    messages, described, draw = _video(rng)
    colour = messages[1]["content"].split()[1]
    texts = ("<video>\nWhich colour moves?", colour, *_sentence(rng, colour))
    return _turns(*texts), f"{described}{texts}", draw


def _choice(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    """Text only; the answer is anybody's guess, the number tells samples apart."""
    number, colour = rng.randrange(10_000), rng.choice(list(COLOURS))
    return _turns(f"Pick a colour for {number}.", colour, *_sentence(rng, colour)), f"{number}{colour}", dict


def _audio(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    """A tone that rises, falls or stays; a second or so."""
    trend, seconds, start = (
        rng.choice(("rises", "falls", "stays")),
        rng.uniform(0.6, 1.4),
        rng.uniform(300, 600),
    )
    end = {"rises": 2.2, "falls": 1 / 2.2, "stays": 1.0}[trend] * start
    texts = ("<audio>\nWhat does the tone do?", f"The tone {trend}.")
    return _turns(*texts), f"{trend}{seconds}{start}", lambda: {"audio0.wav": _tone(seconds, start, end)}


def _pitch(rng: random.Random) -> tuple[list[dict[str, str]], str, Any]:
    """A high or a low tone."""
    pitch, seconds = rng.choice(("high", "low")), rng.uniform(0.3, 0.7)
    frequency = rng.uniform(250, 450) if pitch == "low" else rng.uniform(1800, 3200)
    texts = ("<audio>\nHow is the tone?", pitch, *_sentence(rng, pitch))
    described = f"{seconds}{frequency}{texts}"
    return _turns(*texts), described, lambda: {"audio0.wav": _tone(seconds, frequency, frequency)}


def _tone(seconds: float, start: float, end: float) -> bytes:
    """A sine that glides from one frequency to another, in Hz."""
    phase = np.cumsum(np.linspace(start, end, int(seconds * SAMPLE_RATE))) * (2 * math.pi / SAMPLE_RATE)
    stream = io.BytesIO()
    samples = (0.4 * np.sin(phase)).astype(np.float32)
    soundfile.write(stream, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()


BUILDERS = {
    "caption": _caption, "question": _question, "pair": _pair, "count": _count,
    "video": _video, "text": _text, "audio": _audio,
    "colour": _colour, "colours": _colours, "clip": _clip, "choice": _choice, "pitch": _pitch,
}  # fmt: skip
