# SPDX-License-Identifier: Apache-2.0
"""The parity matrix as the templates print it: one table a model, layouts down, modalities across."""

from collections.abc import Iterable, Iterator
from typing import Any

from models.contract.errors import RunError

Row = dict[str, Any]
SCHEMA_VERSION = 1
MEASURES = ("logits", "loss", "gradient_norm")
"""What a cell shows, one below the other."""


def check_parity(document: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The document as it is. Raises RunError when it is no parity matrix of this version, or holds no cell."""
    needed = {"oracle", "dtype", "limits", "cells"}
    if (
        document.get("schema_version") != SCHEMA_VERSION
        or not needed <= set(document)
        or not document["cells"]
    ):
        raise RunError(
            "not a parity matrix", where=where, expected=f"schema_version {SCHEMA_VERSION} with cells",
            got=f"schema_version {document.get('schema_version')}, keys {', '.join(document)}",
            fix="measure it again: python -m models.entry.parity --output FILE",
        )  # fmt: skip
    return document


def parity_view(documents: Iterable[dict[str, Any]], t: dict[str, str]) -> list[Row]:
    """One entry a model of every `parity.json`: table, number of cells that agree, and the worst of each measure."""
    return [
        _model_view(model, [cell for cell in document["cells"] if cell["model"] == model], document, t)
        for document in documents
        for model in sorted({cell["model"] for cell in document["cells"]})
    ]


def parity_failures(documents: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the cells that do not agree."""
    return [
        f"{cell['model']}, {cell['modality']}, {cell['num_processes']} × {cell['layout']}: {cell['worst']}"
        for document in documents
        for cell in document["cells"]
        if not cell["agrees"]
    ]


def _model_view(model: str, cells: list[dict[str, Any]], document: dict[str, Any], t: dict[str, str]) -> Row:
    modalities = list(dict.fromkeys(cell["modality"] for cell in sorted(cells, key=_order)))
    layouts = sorted({(cell["num_processes"], cell["layout"]) for cell in cells})
    at = {(cell["num_processes"], cell["layout"], cell["modality"]): cell for cell in cells}
    agree = sum(cell["agrees"] for cell in cells)
    return {
        "model": model,
        "summary": t["parity_summary"].format(
            agree=agree, total=len(cells), oracle=document["oracle"], dtype=document["dtype"]
        ),
        "tone": "good" if agree == len(cells) else "bad",
        "modalities": modalities,
        "worst": list(_worst(cells, document, t)),
        "rows": [
            {
                "processes": count,
                "layout": layout,
                "cells": [_cell(at.get((count, layout, modality))) for modality in modalities],
            }
            for count, layout in layouts
        ],
    }


_FIRST = ("text", "image", "several images", "video", "mixed", "media on one rank")


def _order(cell: dict[str, Any]) -> tuple[int, str]:
    name = cell["modality"]
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST) + (name == "packed"), name)


def _worst(
    cells: list[dict[str, Any]], document: dict[str, Any], t: dict[str, str]
) -> Iterator[tuple[str, str, str]]:
    for name in (*MEASURES, "gradient"):
        worst = max(cells, key=lambda cell: cell[name])
        where = f"{worst['modality']}, {worst['num_processes']} × {worst['layout']}"
        yield t[f"parity_{name}"], f"{worst[name]:.1e} / {document['limits'][name]:.0e}", where


def _cell(cell: dict[str, Any] | None) -> Row:
    if cell is None:
        return {"lines": ["–"], "tone": "none", "title": ""}
    return {
        "lines": [f"{cell[name]:.1e}" for name in MEASURES],
        "tone": "good" if cell["agrees"] else "bad",
        "title": f"{cell['gradient']:.1e} {cell['worst']}",
    }
