# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG text: no script, no network, colours from the page's CSS variables (light, dark, print).

Every chart is drawn twice, for a wide and for a narrow column, and CSS shows one: a scaled-down drawing would have
unreadable labels. Long series are thinned to two points a pixel column (its smallest and its largest value), so that
spikes stay visible.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE = (760, 270)
NARROW = (360, 240)
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 34
_TEXT_HEIGHT = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve. `style` is a CSS class: `run`, `base`, `mean`, `control`."""

    x: Sequence[float]
    y: Sequence[float]
    style: str
    label: str
    is_measured: bool = False
    """Measured values that are not finite are marked at the top edge; a smoothed curve just has gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A filled area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shade:
    """A marked stretch of the x axis."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal line."""

    y: float
    label: str = ""


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    bands: Sequence[Band] = (),
    shades: Sequence[Shade] = (),
    levels: Sequence[Level] = (),
    percent: bool = False,
) -> str:
    """Curves over iterations, both sizes. Points that are not finite leave a gap."""
    drawn = "".join(
        _sized(
            name,
            size,
            title,
            lambda size: _line_svg(size, lines, bands, shades, levels, x_label, y_label, percent),
        )
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    )
    legend = [(line.style, line.label) for line in lines] + [("band", band.label) for band in bands]
    legend += [("shade", shade.label) for shade in shades if shade.label]
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{drawn}{_legend(legend)}</figure>'


def histogram(
    values: Sequence[float], *, title: str, x_label: str, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """How often which value, both sizes; `marks` are named vertical lines. The far tail is drawn in the last bin."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return ""
    drawn = "".join(
        _sized(name, size, title, lambda size: _histogram_svg(size, finite, x_label, marks))
        for name, size in (("wide", (WIDE[0], 180)), ("narrow", (NARROW[0], 170)))
    )
    legend = _legend([("mark", label) for _, label in marks])
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{drawn}{legend}</figure>'


def effect_bar(
    effect: float, interval: tuple[float, float] | None, margin: tuple[float, float] | None, *, title: str
) -> str:
    """One effect with its interval against the margin, as a relative change; what lies outside gets an arrow."""
    bounds = [bound for bound in margin or () if bound != OPEN_BELOW]
    edge = 1.6 * max(abs(bound) for bound in bounds) if bounds else 1.3 * max(abs(effect), 1e-9)
    if interval and not margin:
        edge = 1.3 * max(abs(bound) for bound in (*interval, effect) if math.isfinite(bound))
    edge = edge if math.isfinite(edge) and edge > 0 else 1.0
    drawn = "".join(
        _sized(name, size, title, lambda size: _effect_svg(size, effect, interval, margin, edge))
        for name, size in (("wide", (520, 58)), ("narrow", (330, 58)))
    )
    return f'<div class="effect">{drawn}</div>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values inside [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(x: Sequence[float], y: Sequence[float], columns: int) -> list[tuple[float, float]]:
    """At most two points a column: its smallest and largest value, in order. Gaps (not finite) are kept as NaN."""
    points = list(zip(x, y, strict=True))
    if len(points) <= 2 * columns:
        return points
    chosen: list[tuple[float, float]] = []
    size = len(points) / columns
    for column in range(columns):
        part = points[int(column * size) : int((column + 1) * size)]
        finite = [point for point in part if math.isfinite(point[1])]
        if len(finite) < len(part):
            chosen.append((part[0][0], math.nan))
        if finite:
            low, high = (pick(finite, key=lambda point: point[1]) for pick in (min, max))
            chosen += sorted({low, high})
    return chosen


def _sized(name: str, size: tuple[int, int], title: str, draw: Callable[[tuple[int, int]], str]) -> str:
    width, height = size
    return (
        f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{draw(size)}</svg>"
    )


def _line_svg(
    size: tuple[int, int],
    lines: Sequence[Line],
    bands: Sequence[Band],
    shades: Sequence[Shade],
    levels: Sequence[Level],
    x_label: str,
    y_label: str,
    percent: bool,
) -> str:
    all_x = [value for line in lines for value in line.x]
    all_y = [value for line in lines for value in line.y] + [level.y for level in levels]
    all_y += [value for band in bands for side in (band.low, band.high) for value in side]
    finite_y = [value for value in all_y if math.isfinite(value)]
    if not all_x or not finite_y:
        return _text(size[0] / 2, size[1] / 2, "–", "middle")
    low, high = _padded(min(finite_y), max(finite_y))
    scale = _Scale(size, min(all_x), max(all_x), low, high)
    columns = size[0] // 2
    parts = [
        f'<rect class="shade" x="{scale.x(max(shade.start, scale.x_low)):.1f}" y="{_TOP}" '
        f'width="{max(0.0, scale.x(min(shade.end, scale.x_high)) - scale.x(max(shade.start, scale.x_low))):.1f}" '
        f'height="{size[1] - _TOP - _BOTTOM}"/>'
        for shade in shades
    ]
    parts.append(_axes(scale, x_label, y_label, percent))
    parts += [_band(scale, band, columns) for band in bands]
    parts += _levels(scale, levels)
    parts += [_curve(scale, line, columns) for line in lines]
    return "".join(parts)


def _levels(scale: "_Scale", levels: Sequence[Level]) -> list[str]:
    """Lines across, their labels above them; below, where another label would be written over."""
    parts, lowest_label = [], -math.inf
    for level in sorted(levels, key=lambda level: level.y, reverse=True):
        line, right = scale.y(level.y), scale.size[0] - _RIGHT
        parts.append(f'<path class="level" d="M{_LEFT} {line:.1f}H{right}"/>')
        if level.label:
            label = line - 3 if line - 3 - lowest_label > _TEXT_HEIGHT else line + _TEXT_HEIGHT
            lowest_label = label
            parts.append(_text(right - 2, label, level.label, "end"))
    return parts


class _Scale:
    """Data to drawing coordinates."""

    def __init__(
        self, size: tuple[int, int], x_low: float, x_high: float, y_low: float, y_high: float
    ) -> None:
        self.size = size
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1
        self.y_low, self.y_high = y_low, y_high

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (self.size[0] - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.size[1] - _BOTTOM - share * (self.size[1] - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """A line through the points. One format call for all of them: a report draws a million."""
        across = (self.size[0] - _LEFT - _RIGHT) / (self.x_high - self.x_low)
        down = (self.size[1] - _TOP - _BOTTOM) / (self.y_high - self.y_low)
        left, bottom = _LEFT - self.x_low * across, self.size[1] - _BOTTOM + self.y_low * down
        flat = [value for x, y in points for value in (left + x * across, bottom - y * down)]
        return "L".join(["%.1f %.1f"] * len(points)) % tuple(flat)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _axes(scale: _Scale, x_label: str, y_label: str, percent: bool) -> str:
    width, height = scale.size
    parts = []
    for value in ticks(scale.y_low, scale.y_high, 5):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.3%}" if percent and abs(value) < 0.001 and value else
                           (f"{value:.1%}" if percent else _number(value)), "end"))  # fmt: skip
    for value in ticks(scale.x_low, scale.x_high, 8 if width > 500 else 4):
        parts.append(_text(scale.x(value), height - _BOTTOM + 15, _number(value), "middle"))
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{height - _BOTTOM}" y2="{height - _BOTTOM}"/>'
    )
    parts.append(_text((_LEFT + width - _RIGHT) / 2, height - 4, x_label, "middle", "label"))
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(
        f'<text class="label" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


MARKED_POINTS = 12


def _curve(scale: _Scale, line: Line, columns: int) -> str:
    points = thin(line.x, line.y, columns)
    stretches = [
        list(stretch) for is_drawn, stretch in itertools.groupby(points, lambda point: math.isfinite(point[1]))
        if is_drawn
    ]  # fmt: skip
    path = "".join(f"M{scale.path(stretch)}" for stretch in stretches)
    bad = [
        f'<path class="bad" d="M{scale.x(x):.1f} {_TOP + 8}l-4 -8h8z"/>'
        for x, y in points
        if line.is_measured and not math.isfinite(y)
    ]
    # A line of one point is no line: few points are marked.
    few = points if len(points) <= MARKED_POINTS else []
    marks = [
        f'<circle class="{line.style}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3"/>'
        for x, y in few
        if math.isfinite(y)
    ]
    return f'<path class="{line.style}" d="{path}"/>' + "".join((*marks, *bad))


def _band(scale: _Scale, band: Band, columns: int) -> str:
    step = max(1, len(band.x) // (2 * columns))
    rows = [
        (x, low, high)
        for x, low, high in list(zip(band.x, band.low, band.high, strict=True))[::step]
        if math.isfinite(low) and math.isfinite(high)
    ]
    outline = [(x, high) for x, _, high in rows] + [(x, low) for x, low, _ in reversed(rows)]
    return f'<path class="band" d="M{scale.path(outline)}z"/>' if rows else ""


def _histogram_svg(
    size: tuple[int, int], values: list[float], x_label: str, marks: Sequence[tuple[float, str]]
) -> str:
    low = min(values[0], *(mark for mark, _ in marks)) if marks else values[0]
    # the slowest 2% share the last bin, or one stalled step flattens everything else
    high = max(values[min(len(values) - 1, int(0.98 * len(values)))], *(mark for mark, _ in marks), low)
    low, high = _padded(low, high)
    count = 40 if size[0] > 500 else 24
    heights = [0] * count
    for value in values:
        heights[min(count - 1, max(0, int((value - low) / (high - low) * count)))] += 1
    scale = _Scale(size, low, high, 0.0, max(heights) * 1.05)
    bar = (scale.x(high) - scale.x(low)) / count
    parts = [_axes(scale, x_label, "n", percent=False)]
    parts += [
        f'<rect class="bar" x="{scale.x(low) + index * bar + 0.5:.1f}" y="{scale.y(height):.1f}" '
        f'width="{bar - 1:.1f}" height="{scale.y(0) - scale.y(height):.1f}"/>'
        for index, height in enumerate(heights)
        if height
    ]
    parts += [
        f'<line class="mark" x1="{scale.x(mark):.1f}" x2="{scale.x(mark):.1f}" y1="{_TOP}" y2="{size[1] - _BOTTOM}"/>'
        for mark, _ in marks
    ]
    return "".join(parts)


OPEN_BELOW = -1.0
"""A lower bound of -100% bounds nothing: less memory than none, worse than all answers wrong."""
LABEL_ROOM = 26


def _effect_svg(
    size: tuple[int, int],
    effect: float,
    interval: tuple[float, float] | None,
    margin: tuple[float, float] | None,
    edge: float,
) -> str:
    width, height = size
    pad, middle = 14, 20

    def x(value: float) -> float:
        clipped = min(edge, max(-edge, value)) if not math.isnan(value) else 0.0
        return pad + (clipped + edge) / (2 * edge) * (width - 2 * pad)

    parts = []
    if margin:
        parts.append(
            f'<rect class="margin" x="{x(margin[0]):.1f}" y="6" width="{x(margin[1]) - x(margin[0]):.1f}" height="28"/>'
        )
        parts += [_text(x(bound), height - 8, f"{bound:+.1%}" if abs(bound) >= 0.01 else f"{bound:+.2%}", "middle")
                  for bound in margin if bound != OPEN_BELOW]  # fmt: skip
    parts.append(f'<line class="axis" x1="{pad}" x2="{width - pad}" y1="{middle}" y2="{middle}"/>')
    parts.append(f'<line class="grid" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="6" y2="34"/>')
    if all(abs(x(bound) - x(0)) > LABEL_ROOM for bound in margin or ()):
        parts.append(_text(x(0), height - 8, "0", "middle"))
    if interval:
        parts.append(
            f'<line class="interval" x1="{x(interval[0]):.1f}" x2="{x(interval[1]):.1f}" y1="{middle}" y2="{middle}"/>'
        )
        parts += [
            f'<path class="arrow" d="M{x(bound):.1f} {middle - 6}l{6 * sign} 6l{-6 * sign} 6z"/>'
            for bound, sign in zip(interval, (-1, 1), strict=True)
            if abs(bound) > edge
        ]
    if math.isfinite(effect):
        parts.append(f'<circle class="point" cx="{x(effect):.1f}" cy="{middle}" r="5"/>')
    return "".join(parts)


def _legend(rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    items = "".join(f'<li><span class="key {style}"></span>{escape(label)}</li>' for style, label in rows)
    return f'<ul class="legend">{items}</ul>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)))
        return f"{round(value / 10.0**exponent, 6):g}e{exponent}"
    return f"{round(value, 6):,.10g}"
