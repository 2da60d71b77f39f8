# SPDX-License-Identifier: Apache-2.0
"""The side-by-side page: pictures, questions, answers before and after, and the truth. One file, works offline."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from models.contract.errors import DataError
from models.contract.evaluation import Evaluation, EvaluationItem, score_items
from models.datasets.media import decode_image, decode_video
from models.datasets.sample import Medium, Sample, SampleRejected

THUMBNAIL_SIDE = 160
"""Longest side of a picture on the page, in pixels."""
FILM_STRIP_FRAMES = 6


def render_page(
    columns: Mapping[str, Evaluation],
    samples: Iterable[Sample],
    *,
    title: str,
    max_rows: int = 200,
    gates: Sequence[Mapping[str, Any]] = (),
) -> str:
    """HTML page that compares evaluations of the same items.

    Args:
        columns: Heading → evaluation, in the order of the columns; the first is what the others are compared with.
        samples: The dataset, for its pictures; samples without a row are passed over.
        title: Heading of the page.
        max_rows: Rows shown; the scores above are over all items.
        gates: Gate results as plain data, shown above the table.

    Raises:
        DataError: the evaluations did not ask the same questions.
    """
    check_same_items(columns)
    first = next(iter(columns.values()))
    keys = {item.key.rpartition("#")[0] for item in first.items[:max_rows]}
    pictures = {
        sample.key: [picture(medium) for medium in sample.media] for sample in samples if sample.key in keys
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("comparison.html").render(
        title=title,
        columns=[
            {
                "name": name,
                "evaluation": evaluation,
                "scores": score_items(evaluation.items),
                "checkpoint": short_path(evaluation.checkpoint),
                "dataset": short_path(evaluation.dataset),
            }
            for name, evaluation in columns.items()
        ],
        rows=[_row(index, columns, pictures) for index in range(min(max_rows, len(first.items)))],
        num_items=len(first.items),
        gates=gates,
    )


def check_same_items(columns: Mapping[str, Evaluation]) -> None:
    """Refuse columns that cannot stand side by side. Raises DataError."""
    asked = {
        name: [(item.key, item.question, item.truth) for item in evaluation.items]
        for name, evaluation in columns.items()
    }
    first = next(iter(asked))
    for name, items in asked.items():
        if items != asked[first]:
            raise DataError(
                "the evaluations did not ask the same questions",
                where=f"{first} and {name}",
                expected=f"{len(asked[first])} items of {columns[first].dataset}",
                got=f"{len(items)} items of {columns[name].dataset}",
                fix="evaluate both on the same dataset, split and limit",
            )


def _row(index: int, columns: Mapping[str, Evaluation], pictures: Mapping[str, list[str]]) -> dict[str, Any]:
    items: list[EvaluationItem] = [evaluation.items[index] for evaluation in columns.values()]
    sample_key, _, turn = items[0].key.rpartition("#")
    return {
        "key": items[0].key,
        "question": items[0].question,
        "truth": items[0].truth,
        "kind": items[0].kind,
        # a follow-up question is about the pictures of the row above it
        "pictures": pictures.get(sample_key, []) if int(turn) <= 2 else [],
        "answers": [_answer(item) for item in items],
    }


def _answer(item: EvaluationItem) -> dict[str, Any]:
    """What a cell shows. A caption that is not word for word is neither right nor wrong: its F1 says how near it is."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in item.answer)
    note = f"F1 {item.token_f1:.2f}" if item.kind == "caption" else ("right" if item.is_exact else "wrong")
    word = "right" if item.is_exact else ("partly" if item.kind == "caption" else "wrong")
    return {"text": text, "word": word, "note": note, "cut": not item.is_finished}


def short_path(path: str) -> str:
    """The last three parts of a path: enough to tell checkpoints apart, and nothing about the machine."""
    return "/".join(Path(path).parts[-3:]) if Path(path).is_absolute() else path


def picture(medium: Medium) -> str:
    """A thumbnail as a data URI: an image, a film strip of a video, a wave form of a sound."""
    try:
        if medium.kind == "image":
            return _data_uri(decode_image(medium.data[0], medium.name))
        if medium.kind == "video":
            return _data_uri(_film_strip(medium))
    except SampleRejected:
        return ""
    return f"data:audio/wav;base64,{base64.b64encode(medium.data[0]).decode()}"


def _film_strip(medium: Medium) -> Image.Image:
    frames = decode_video(medium).frames  # [n, h, w, 3]
    count = min(len(frames), FILM_STRIP_FRAMES)
    picked = [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
    height, width = picked[0].shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / 2 / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    strip = Image.new("RGB", ((size[0] + 2) * count - 2, size[1]), (255, 255, 255))
    for index, frame in enumerate(picked):
        strip.paste(Image.fromarray(frame).resize(size), (index * (size[0] + 2), 0))
    return strip


def _data_uri(image: Image.Image) -> str:
    shown = image.copy()
    if image.width <= 2 * image.height:  # film strips keep their length
        shown.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = io.BytesIO()
    shown.save(stream, format="PNG" if max(shown.size) <= THUMBNAIL_SIDE // 2 else "JPEG", quality=85)
    kind = "png" if stream.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
