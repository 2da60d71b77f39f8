# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: samples of a dataset to be looked at, with their media, turns and loss masks."""

import base64
import html
import io
import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from models.contract.errors import ConfigError
from models.datasets.inspection import Inspection, Shown
from models.datasets.media import decode_image, decode_video
from models.datasets.sample import Medium

THUMB = 160
VIDEO_FRAMES = 4
COLUMNS, CELL = 4, 340
WORD = re.compile(r"<\|[^|]*\|>|\n|[^\S\n]+|[^\s<]{1,36}|<")
"""What a line is made of: special tokens, line ends, blanks, words; a word longer than a line is cut."""
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body{{font:14px/1.45 system-ui,sans-serif;margin:24px;background:#fafafa;color:#222}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:16px}}
article{{background:#fff;border:1px solid #ddd;border-radius:8px;padding:12px;overflow:hidden}}
h1{{font-size:18px}} h2{{font-size:12px;color:#777;margin:0 0 8px;font-weight:500}}
img{{max-height:160px;max-width:100%;margin:0 6px 6px 0;border-radius:4px;image-rendering:pixelated}}
pre{{white-space:pre-wrap;word-break:break-word;font:12px/1.5 ui-monospace,monospace;margin:8px 0 0}}
mark{{background:#c9f2c7;border-radius:2px}} .skip{{color:#999}} audio{{width:100%}}
</style><h1>{title}</h1><p>{legend}</p><main>{cells}</main>"""


def write_sheet(path: Path, result: Inspection) -> None:
    """Write a contact sheet; the suffix says which kind.

    Raises:
        ConfigError: another suffix than .html or .png, or the file exists.
    """
    if path.suffix not in (".html", ".png"):
        raise ConfigError("unknown kind of contact sheet", where=str(path), expected=".html or .png")
    if path.exists():
        raise ConfigError("output exists", where=str(path), fix="choose another file, or remove it first")
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".html":
        partial.write_text(render_html(result), encoding="utf-8")
    else:
        render_image(result).save(partial, format="PNG")
    partial.rename(path)


def render_html(result: Inspection) -> str:
    """The sheet as one page without outside files; learned text is marked."""
    usable = result.num_seen - len(result.broken)
    title = f"{Path(result.folder).name} [{result.split}]: {usable} of {result.num_seen} samples usable"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in result.reasons.most_common()) or "none"
    legend = f"<mark>marked</mark> text is learned · broken: {html.escape(reasons)}"
    cells = "".join(_html_cell(shown) for shown in result.shown)
    return PAGE.format(title=html.escape(title), legend=legend, cells=cells)


def _html_cell(shown: Shown) -> str:
    media = "".join(_html_medium(medium) for medium in shown.sample.media)
    if shown.tokens:
        text = "".join(
            f"<mark>{html.escape(piece)}</mark>" if learned else html.escape(piece)
            for piece, learned in shown.tokens
        )
        text = text.replace("</mark><mark>", "")
    else:
        text = html.escape(shown.text)
    length = f" · {shown.length} tokens" if shown.length else ""
    return f"<article><h2>{html.escape(shown.sample.key)}{length}</h2>{media}<pre>{text}</pre></article>"


def _html_medium(medium: Medium) -> str:
    if medium.kind == "audio":
        data = base64.b64encode(medium.data[0]).decode()
        return f'<audio controls src="data:audio/{medium.name.rsplit(".", 1)[-1]};base64,{data}"></audio>'
    return "".join(
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(_png(image)).decode()}">'
        for image in thumbnails(medium)
    )


def thumbnails(medium: Medium) -> list[Image.Image]:
    """Small pictures of an image, or of a few frames of a video."""
    if medium.kind == "image":
        images = [decode_image(medium.data[0], medium.name)]
    elif medium.kind == "video":
        frames = decode_video(medium).frames
        step = max(1, len(frames) // VIDEO_FRAMES)
        images = [Image.fromarray(frame) for frame in frames[::step][:VIDEO_FRAMES]]
    else:
        return []
    for image in images:
        image.thumbnail((THUMB, THUMB))
    return images


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def render_image(result: Inspection) -> Image.Image:
    """The sheet as one picture; learned text is green."""
    rows = -(-len(result.shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, max(1, rows) * CELL), "white")
    for index, shown in enumerate(result.shown):
        left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
        _draw_cell(sheet, shown, left + 8, top + 8)
    return sheet


def _draw_cell(sheet: Image.Image, shown: Shown, left: int, top: int) -> None:
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    canvas.rectangle((left - 4, top - 4, left + CELL - 14, top + CELL - 14), outline="#dddddd")
    canvas.text((left, top), f"{shown.sample.key}  {shown.length or ''}", fill="#777777", font=font)
    x, height = left, 0
    for medium in shown.sample.media:
        for image in thumbnails(medium):
            image.thumbnail((THUMB * 3 // 4, THUMB * 3 // 4))
            if x + image.width > left + CELL - 16:
                break
            sheet.paste(image, (x, top + 20))
            x, height = x + image.width + 4, max(height, image.height)
    pieces = shown.tokens or [(shown.text, False)]
    _draw_text(canvas, font, pieces, left, top + 26 + height, right=left + CELL - 20, bottom=top + CELL - 24)


def _draw_text(
    canvas: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, pieces: list[tuple[str, bool]],
    left: int, top: int, *, right: int, bottom: int,
) -> None:  # fmt: skip
    """Words flow as in a page; what follows a newline begins a line, and what does not fit is left out."""
    x, y = float(left), top
    for learned, run in groupby(pieces, key=itemgetter(1)):
        text = "".join(piece for piece, _ in run)
        for word in WORD.findall(text):
            width = canvas.textlength(word, font=font) if word != "\n" else 0.0
            if word == "\n" or (x + width > right and not word.isspace()):
                x, y = float(left), y + 16
            if y > bottom - 16:
                return
            if word != "\n":
                canvas.text((x, y), word, fill="#0a7a2f" if learned else "#444444", font=font)
                x += width
