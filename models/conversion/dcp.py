# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's DCP checkpoints: HF tensors under a prefix, experts flattened to two axes, in torch's sharded format.

DIR/latest_checkpointed_iteration.txt     release, or the iteration
DIR/release/.metadata, __0_0.distcp …     model.model.<HF name> (2025) or model.<HF name> (2026)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from models.contract.errors import WeightMappingError
from models.conversion.convert import (
    Options,
    Summary,
    as_template,
    cast,
    write_hf,
    write_shards_of,
    write_torch_dist,
)
from models.conversion.dcp_folder import DcpFolder, find_iteration, model_weights, open_dcp
from models.conversion.source import Source, open_source
from models.conversion.tensor_source import AsMegatron, TensorSource, TensorSpec, check_megatron_tensors, few

Style = Literal["2025", "2026"]
PREFIXES: dict[Style, str] = {"2025": "model.model.", "2026": "model."}
"""What stands before the HF name: the nesting of the saved dictionary, and in 2025 the converter's own prefix."""
VERSION_ENTRY = {"checkpoint_version": 3.0}
"""Without it Megatron's argument check refuses the checkpoint."""


@dataclass(frozen=True, slots=True)
class AsDcp:
    """HF tensors under DCP names, experts `[E, a, b]` as `[E*a, b]`."""

    hf: TensorSource
    prefix: str
    ties: dict[str, str]
    """Extra names and the tensors that they repeat."""
    specs: dict[str, TensorSpec] = field(init=False)

    def __post_init__(self) -> None:
        stored = dict(self.hf.specs) | {name: self.hf.specs[original] for name, original in self.ties.items()}
        specs = {
            self.prefix + name: TensorSpec(flattened(name, spec.shape), spec.dtype)
            for name, spec in stored.items()
        }
        object.__setattr__(self, "specs", specs)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as DCP has it."""
        name = name.removeprefix(self.prefix)
        name = self.ties.get(name, name)
        shape = self.hf.specs[name].shape
        if flattened(name, shape) == shape:
            return self.hf.read(name, start, stop)
        rows = shape[1]
        first, last = start // rows, -(-stop // rows)
        value = self.hf.read(name, first, last).reshape(-1, shape[2])
        return value[start - first * rows : stop - first * rows]


@dataclass(frozen=True, slots=True)
class FromDcp:
    """DCP tensors under HF names and in HF shapes, those of a template."""

    dcp: DcpFolder
    prefix: str
    specs: dict[str, TensorSpec]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as HF has it."""
        shape, stored = self.specs[name].shape, self.dcp.specs[self.prefix + name].shape
        rows = shape[1] if stored != shape else 1
        value = self.dcp.read(self.prefix + name, start * rows, stop * rows)
        return value.reshape(stop - start, *shape[1:]).to(self.specs[name].dtype) if shape else value


def flattened(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a DCP: fused experts lose their first axis, so that sharding by rows works with few experts."""
    if ".experts." in name and len(shape) == 3:
        return (shape[0] * shape[1], shape[2])
    return shape


def hf_to_dcp(
    source_folder: Path, target: Path, options: Options, *, style: Style = "2025", tie_weight: bool = False
) -> Summary:
    """Convert a HF folder to a DCP. With `tie_weight` a tied output layer is stored as well.

    Raises:
        ConfigError, WeightMappingError, RunError: as `hf_to_megatron`.
    """
    source = open_source(source_folder, experts=options.experts)
    with source.checkpoint:
        return _write_dcp(
            source.checkpoint, source, target, options, style, tie_weight=tie_weight, kind="hf-to-dcp"
        )


def megatron_to_dcp(
    source_folder: Path,
    target: Path,
    hf_folder: Path,
    options: Options,
    *,
    style: Style = "2025",
    tie_weight: bool = False,
) -> Summary:
    """Convert a torch_dist checkpoint to a DCP with the tensors of a HF template."""
    template = open_source(hf_folder, experts=options.experts)
    iteration = find_iteration(source_folder)
    with template.checkpoint, open_dcp(iteration) as folder:
        weights = model_weights(folder)
        check_megatron_tensors(weights, template.rules, where=str(iteration))
        hf = as_template(weights, template, options.dtype)
        return _write_dcp(hf, template, target, options, style, tie_weight=tie_weight, kind="megatron-to-dcp")


def dcp_to_hf(source_folder: Path, target: Path, hf_folder: Path, options: Options) -> Summary:
    """Convert a DCP to a HF folder with the names, shards and files of a template.

    Raises:
        WeightMappingError: the DCP lacks tensors of the template, has others, or has them in other shapes.
    """
    template = open_source(hf_folder, experts=options.experts)
    with template.checkpoint, open_dcp(find_iteration(source_folder)) as folder:
        hf = from_dcp(folder, template, options.dtype)
        return write_hf(hf, template, target, options, folder, kind="dcp-to-hf")


def dcp_to_megatron(source_folder: Path, target: Path, hf_folder: Path, options: Options) -> Summary:
    """Convert a DCP to a torch_dist checkpoint; the template gives config, names and shapes."""
    template = open_source(hf_folder, experts=options.experts)
    with template.checkpoint, open_dcp(find_iteration(source_folder)) as folder:
        hf = from_dcp(folder, template, None)
        megatron = AsMegatron(hf, template.rules, options.dtype)
        return write_torch_dist(megatron, template, target, options, kind="dcp-to-megatron")


def from_dcp(folder: DcpFolder, template: Source, dtype: torch.dtype | None) -> FromDcp:
    """A DCP's tensors as those of a template, after comparing both in both directions.

    A tied output layer that only one of them stores is no difference.
    """
    prefix = detect_prefix(folder, template)
    wanted = template.checkpoint.specs
    copies = {copy.name for rule in template.rules for copy in rule.copies}
    found = {name.removeprefix(prefix) for name in folder.specs if name.startswith("model.")}
    missing, extra = sorted(wanted.keys() - found - copies), sorted(found - wanted.keys() - copies)
    misshapen = [
        f"{name} {folder.specs[prefix + name].shape} instead of {spec.shape}"
        for name, spec in wanted.items()
        if name in found
        and folder.specs[prefix + name].shape not in (spec.shape, flattened(name, spec.shape))
    ]
    problems = [("missing", missing), ("unexpected", extra), ("wrong shape", misshapen)]
    if missing or extra or misshapen:
        raise WeightMappingError(
            "the DCP does not fit the HF checkpoint", where=str(folder.folder), expected=f"{len(wanted)} tensors",
            got="; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in problems if names),
            fix="give the HF checkpoint that the DCP was made from",
        )  # fmt: skip
    originals = {copy.name: rule.sources[0].name for rule in template.rules for copy in rule.copies}
    chunks = dict(folder.chunks)
    specs = dict(folder.specs)
    for name in (
        wanted.keys() & originals.keys() - found
    ):  # the template stores a copy that the DCP leaves out
        specs[prefix + name], chunks[prefix + name] = (
            specs[prefix + originals[name]],
            chunks[prefix + originals[name]],
        )
    whole = folder.replaced(specs, chunks)
    return FromDcp(
        whole, prefix, {name: TensorSpec(spec.shape, dtype or spec.dtype) for name, spec in wanted.items()}
    )


def detect_prefix(folder: DcpFolder, template: Source) -> str:
    """What stands before the HF names. Raises WeightMappingError if nothing known does."""
    probe = next(iter(template.checkpoint.tensors))
    found = [prefix for prefix in PREFIXES.values() if prefix + probe in folder.specs]
    if len(found) != 1:
        raise WeightMappingError(
            "cannot tell how the DCP names its tensors", where=str(folder.folder),
            expected=" or ".join(prefix + probe for prefix in PREFIXES.values()), got=few(sorted(folder.specs)),
            fix="give the HF checkpoint that the DCP was made from",
        )  # fmt: skip
    return found[0]


def _write_dcp(
    hf: TensorSource,
    source: Source,
    target: Path,
    options: Options,
    style: Style,
    *,
    tie_weight: bool,
    kind: str,
) -> Summary:
    stored = hf.specs
    copies = {copy.name: rule.sources[0].name for rule in source.rules for copy in rule.copies}
    ties = {name: original for name, original in copies.items() if tie_weight and name not in stored}
    view = AsDcp(cast(hf, options.dtype), PREFIXES[style], ties)
    return write_shards_of(view, source, target, options, kind=kind, objects=VERSION_ENTRY, config=None)
