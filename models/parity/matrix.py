# SPDX-License-Identifier: Apache-2.0
"""The parity matrix: model × modality × layout, each cell the measured difference from transformers in fp32.

A cell runs two micro-batches (dealt out over the data-parallel ranks) forward and backward on gloo processes and
compares logits, loss, the norm over all gradients and every single gradient with what transformers computes for the
same micro-batches and weights in one process.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.parity.jobs import make_jobs, run_jobs
from models.parity.layouts import Job
from models.parity.oracles import TINY

SCHEMA_VERSION = 1
LIMITS = {"logits": 1e-4, "loss": 1e-5, "gradient_norm": 1e-4, "gradient": 1e-3}
"""Largest relative difference of a cell that agrees. Worst of 698 measured cells: logits 2.3e-6, loss 1.5e-7,
gradient norm 7.1e-7, gradient 1.1e-4 (a parameter of next to no gradient)."""

Changes = dict[str, Any]
TP: Changes = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP: Changes = {"pipeline_model_parallel_size": 2}
UNEVEN = PP | {"num_layers_in_first_pipeline_stage": 1}
CP: Changes = {"context_parallel_size": 2}
DP: Changes = {"num_dp": 2}
EP: Changes = {"expert_model_parallel_size": 2}
ETP: Changes = {"expert_tensor_parallel_size": 2}
FULL: Changes = {"recompute": "full", "recompute_vision": True}
VIRTUAL: Changes = {
    "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2, "num_layers": 8,
}  # fmt: skip
"""Eight decoder layers, one a virtual stage: deepstack features travel over three of them."""

LAYOUTS: dict[int, dict[str, Changes]] = {
    1: {"one": {}, "recompute": FULL, "recompute selective": {"recompute": "selective"}},
    2: {"tp2": TP, "tp2 sp": SP, "pp2": PP, "pp2 1+3": UNEVEN, "cp2": CP, "dp2": DP},
    4: {
        "tp2 sp cp2": SP | CP,
        "tp2 sp pp2": SP | UNEVEN,
        "pp4": {"pipeline_model_parallel_size": 4},
        "pp4 vpp2": VIRTUAL,
        "cp4": {"context_parallel_size": 4},
        "cp2 pp2 recompute": CP | UNEVEN | FULL,
    },
    8: {
        "tp2 sp pp2 dp2": SP | UNEVEN | DP,
        "tp2 sp cp2 dp2": SP | CP | DP,
        "tp2 sp cp2 pp2": SP | CP | UNEVEN,
        "cp2 pp2 dp2": CP | UNEVEN | DP,
    },
}
"""Number of processes → layouts of every model."""
EXPERT_LAYOUTS: dict[int, dict[str, Changes]] = {
    2: {"ep2 dp2": EP | DP, "etp2 dp2": ETP | DP},
    4: {"tp2 sp ep2 etp1": SP | EP | DP | {"expert_tensor_parallel_size": 1}, "tp2 sp ep2 etp2": SP | EP | ETP | DP},
    8: {"ep2 tp2 sp pp2 dp2": SP | EP | UNEVEN | DP, "ep2 tp2 sp cp2 dp2": SP | EP | CP | DP},
}  # fmt: skip
"""Beside those, for models with experts."""
WITHOUT_EXPERTS = frozenset({"tp2"})
"""Layouts that megatron-core refuses to models with experts (tensor parallelism without sequence parallelism)."""

MODALITIES: dict[str, tuple[str, str]] = {
    "text": ("text", "text"),
    "image": ("image", "image"),
    "several images": ("images", "images"),
    "video": ("video", "video"),
    "mixed": ("mixed", "images"),
    "media on one rank": ("mixed", "text"),
}
"""Name → the cases of the two micro-batches; with two data-parallel ranks each gets one."""
AUDIO_MODALITIES: dict[str, tuple[str, str]] = {
    "audio": ("audio", "short audio"),
    "several clips": ("audios", "audios"),
    "audio and vision": ("audio and vision", "mixed"),
    "audio on one rank": ("audio and vision", "image"),
}
PACKED: dict[str, tuple[str, str]] = {"packed": ("mixed", "text")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured comparison."""

    model: str
    modality: str
    layout: str
    num_processes: int
    logits: float
    """Largest difference over the largest logit."""
    loss: float
    """Relative difference of the mean token loss."""
    gradient_norm: float
    """Relative difference of the norm over all gradients."""
    gradient: float
    """Largest relative error of one parameter's gradient on one rank."""
    worst: str
    """That parameter."""
    num_gradients: int
    missing: list[str]
    """Parameters that no rank compared; none should be."""

    @property
    def agrees(self) -> bool:
        """Whether every difference is within its limit and every gradient was compared."""
        return not self.missing and all(getattr(self, name) < limit for name, limit in LIMITS.items())

    @property
    def place(self) -> tuple[str, int, str, str]:
        """What the cell is of."""
        return (self.model, self.num_processes, self.layout, self.modality)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``parity.json``."""
        return asdict(self) | {"agrees": self.agrees}


def has_experts(model: str) -> bool:
    """Whether a tiny model is a mixture of experts."""
    return "num_experts" in TINY[model].config["text_config"]


def layouts_of(model: str, num_processes: int) -> dict[str, Changes]:
    """Layouts of a model on a number of processes."""
    layouts = LAYOUTS[num_processes]
    if not has_experts(model):
        return layouts
    kept = {name: changes for name, changes in layouts.items() if name not in WITHOUT_EXPERTS}
    return kept | EXPERT_LAYOUTS.get(num_processes, {})


def modalities_of(model: str) -> dict[str, tuple[str, str]]:
    """Modalities of a model, packed rows included."""
    hears = "audio_config" in TINY[model].config
    return MODALITIES | (AUDIO_MODALITIES if hears else {}) | PACKED


def measure(
    model: str,
    num_processes: int,
    folder: Path,
    *,
    modalities: tuple[str, ...] | None = None,
    timeout_s: float = 1800,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Run every cell of a model on a number of processes; the processes start once.

    Args:
        model: A key of :data:`TINY`.
        num_processes: A key of :data:`LAYOUTS`.
        folder: For the jobs' and results' files.
        modalities: Only these; None runs all of the model's.
        timeout_s: After which the processes are stopped.
        on_cell: Called with every cell.

    Raises:
        RunError: the processes failed.
    """
    named = list(_jobs(model, num_processes, modalities or tuple(modalities_of(model))))
    named.sort(key=lambda item: item[1].name)  # a layout's process groups are made once
    results = run_jobs(
        [job for _, job in named], num_processes=num_processes, folder=folder, timeout_s=timeout_s
    )
    cells = []
    for (modality, job), result in zip(named, results, strict=True):
        cell = Cell(
            model=model,
            modality=modality,
            layout=job.name,
            num_processes=num_processes,
            logits=result["logits_error"],
            loss=result["loss_error"],
            gradient_norm=result["gradient_norm_error"],
            gradient=result["gradient_error"],
            worst=result["worst"],
            num_gradients=result["num_gradients"],
            missing=result["missing"],
        )
        cells.append(cell)
        on_cell(cell)
    return cells


def _jobs(model: str, num_processes: int, modalities: tuple[str, ...]) -> Iterator[tuple[str, Job]]:
    known = modalities_of(model)
    layouts = layouts_of(model, num_processes)
    depths = {changes.get("num_layers") for changes in layouts.values()}
    for modality in modalities:
        for depth in sorted(depths, key=lambda layers: layers or 0):
            chosen = {
                name: {key: value for key, value in changes.items() if key != "num_layers"}
                for name, changes in layouts.items()
                if changes.get("num_layers") == depth
            }
            cases = known[modality] * (1 if depth is None else 2)  # a virtual pipeline of four takes four
            jobs = make_jobs(model, chosen, cases=cases, packed=modality in PACKED, num_layers=depth)
            yield from ((modality, job) for job in jobs)


def matrix_document(cells: list[Cell], earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """``parity.json``: what was compared with what, the limits, and the cells.

    Args:
        cells: New cells; they take the place of earlier ones.
        earlier: The file as it was.
    """
    rows = {} if earlier is None else {_place(row): row for row in earlier["cells"]}
    rows |= {cell.place: cell.to_dict() for cell in cells}
    return {
        "schema_version": SCHEMA_VERSION,
        "oracle": f"transformers {version('transformers')}",
        "dtype": "fp32",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")}
        | {"python": platform.python_version()},
        "limits": LIMITS,
        "cells": [rows[place] for place in sorted(rows)],
    }


def _place(row: dict[str, Any]) -> tuple[str, int, str, str]:
    return (row["model"], row["num_processes"], row["layout"], row["modality"])
