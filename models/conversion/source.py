# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder together with the table that reads it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from models.common.weight_rules import ExpertLayout, WeightRule
from models.common.weight_tables import NameLayout
from models.contract.architecture import Architecture
from models.contract.errors import WeightMappingError
from models.contract.families import family_part, load_architecture
from models.conversion.checkpoint_folder import CheckpointFolder, open_checkpoint
from models.conversion.tensor_source import few


@dataclass(frozen=True, slots=True)
class Source:
    """An open HF checkpoint whose names and shapes were compared with its table."""

    checkpoint: CheckpointFolder
    architecture: Architecture
    layout: NameLayout
    rules: tuple[WeightRule, ...]
    untouched: tuple[str, ...]
    """Names that no rule reads; export copies them from the source."""

    @property
    def copies(self) -> dict[str, WeightRule]:
        """Stored second copies of a Megatron tensor (a tied output layer), by HF name."""
        stored = self.checkpoint.tensors
        return {copy.name: rule for rule in self.rules for copy in rule.copies if copy.name in stored}


def open_source(folder: Path, *, experts: ExpertLayout | None = None) -> Source:
    """Open a HF checkpoint folder and compare it with its family's table, in both directions.

    Args:
        folder: Folder with config.json and safetensors.
        experts: Layout of fused experts; needed only where shapes cannot tell.

    Raises:
        ConfigError: config.json is missing, broken or of an unknown architecture.
        WeightMappingError: files are broken, or tensors are missing, unexpected or misshapen.
    """
    architecture = load_architecture(folder)
    weights = family_part(architecture.family, "weights")
    checkpoint = open_checkpoint(folder)
    layout = weights.detect_layout(checkpoint.shapes, architecture, experts=experts)
    rules = weights.weight_table(architecture, layout)
    check_against(rules, checkpoint, weights.UNTOUCHED)
    untouched = tuple(name for name in checkpoint.tensors if name.startswith(weights.UNTOUCHED or ("\0",)))
    return Source(checkpoint, architecture, layout, rules, untouched)


def check_copies(source: Source) -> None:
    """Compare every stored second copy with its original, a few rows at a time.

    Raises:
        WeightMappingError: they differ, so the config's claim that they are tied is wrong.
    """
    checkpoint = source.checkpoint
    for name, rule in source.copies.items():
        original, count = rule.sources[0].name, rule.shape[0]
        for start in range(0, count, 4096):
            stop = min(start + 4096, count)
            if not torch.equal(
                checkpoint.read(name, start, stop).view(torch.uint8),
                checkpoint.read(original, start, stop).view(torch.uint8),
            ):
                raise WeightMappingError(
                    "config.json ties two tensors that differ",
                    where=name,
                    expected=f"the same values as {original}",
                    got=f"a difference in rows {start} to {stop - 1}",
                    fix="set tie_word_embeddings to false in config.json if the output layer was trained apart",
                )


def check_against(
    rules: tuple[WeightRule, ...], checkpoint: CheckpointFolder, untouched: tuple[str, ...] = ()
) -> None:
    """Compare a table with a checkpoint, in both directions, before anything is read.

    Raises:
        WeightMappingError: names every kind of disagreement: missing, unexpected and misshapen tensors.
    """
    wanted = {source.name: source for rule in rules for source in rule.sources}
    known = wanted | {copy.name: copy for rule in rules for copy in rule.copies}
    stored = checkpoint.tensors
    missing = sorted(name for name in wanted if name not in stored)
    extra = sorted(name for name in stored if name not in known and not name.startswith(untouched or ("\0",)))
    misshapen = sorted(
        f"{name} {entry.shape} instead of {known[name].shape}"
        for name, entry in stored.items()
        if name in known and entry.shape != known[name].shape
    )
    whole = sorted(
        f"{name} {entry.dtype}"
        for name, entry in stored.items()
        if name in known and not entry.dtype.is_floating_point
    )
    if not (missing or extra or misshapen or whole):
        return
    problems = [
        ("missing", missing), ("unexpected", extra), ("wrong shape", misshapen), ("not floating point", whole)
    ]  # fmt: skip
    raise WeightMappingError(
        "the checkpoint does not fit its config.json",
        where=str(checkpoint.folder),
        expected=f"{len(wanted)} tensors",
        got="; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in problems if names),
        fix="check that config.json and the safetensors files belong to the same model",
    )
