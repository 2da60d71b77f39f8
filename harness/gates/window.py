# SPDX-License-Identifier: Apache-2.0
"""Which iterations the end-window test compares, where a person names them: `451:500`, or `100` for the last 100."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from models.contract.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

Window = tuple[int, int]
"""First and last iteration, both inside. Negative ones count rows from the end: (-100, -1) is the last hundred."""
MIN_WINDOW = 10
"""Iterations. Fewer tell next to nothing, whatever their mean."""


def parse_window(text: str) -> Window:
    """Read `FIRST:LAST` or a length.

    Raises:
        ConfigError: neither, or shorter than :data:`MIN_WINDOW`.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        first, last = int(match[1]), int(match[2])
        size = last - first + 1 if first >= 1 else 0
    elif re.fullmatch(r"\d+", text):
        size = int(text)
        first, last = -size, -1
    else:
        first = last = size = 0
    if size < MIN_WINDOW:
        raise ConfigError(
            "not a window", expected=f"FIRST:LAST or a length, at least {MIN_WINDOW} iterations", got=text,
            fix="for example 451:500, or 50",
        )  # fmt: skip
    return first, last


def rows_of_window(index: pd.Index, window: Window) -> slice | None:
    """Rows of the window; None when the index does not reach from its first to its last iteration."""
    first, last = window
    if first < 0:
        return slice(len(index) + first, len(index)) if len(index) >= -first else None
    if first not in index or last not in index:
        return None
    return index.slice_indexer(first, last)


def window_text(window: Window | None) -> str:
    """The window as it was asked for."""
    if window is None:
        return "at the end"
    return f"of its last {-window[0]} iterations" if window[0] < 0 else f"{window[0]}:{window[1]}"
