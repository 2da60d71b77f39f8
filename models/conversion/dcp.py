# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's DCP checkpoints: HF tensors under a prefix, experts flattened to two axes, in torch's sharded format.

DIR/latest_checkpointed_iteration.txt     release, or the iteration
DIR/release/.metadata, __0_0.distcp …     model.model.<HF name> (2025) or model.<HF name> (2026)

Its converter for Qwen3-Omni merges experts that HF stores one by one to `[E, H, 2I]` and `[E, I, H]`, not flattened,
and leaves `thinker.` out of the names. Reading tells all of these apart by the names in the DCP.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from models.common.weight_rules import WeightRule
from models.contract.errors import ConfigError, WeightMappingError
from models.contract.families import family_part
from models.conversion.convert import (
    Only,
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
from models.conversion.tensor_source import (
    AsHf,
    AsMegatron,
    Joined,
    TensorSource,
    TensorSpec,
    check_megatron_tensors,
    few,
)

Style = Literal["2025", "2026"]
PREFIXES: dict[Style, str] = {"2025": "model.model.", "2026": "model."}
"""What stands before the HF name: the nesting of the saved dictionary, and in 2025 the converter's own prefix."""
VERSION_ENTRY = {"checkpoint_version": 3.0}
"""Without it Megatron's argument check refuses the checkpoint."""


@dataclass(frozen=True, slots=True)
class AsDcp:
    """HF tensors under DCP names; experts `[E, a, b]` as `[E*a, b]` unless `merged`."""

    hf: TensorSource
    prefix: str
    ties: dict[str, str]
    """Extra names and the tensors that they repeat."""
    root: str = ""
    """What the HF names begin with and the DCP's do not."""
    merged: bool = False
    specs: dict[str, TensorSpec] = field(init=False)
    _names: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        stored = dict(self.hf.specs) | {name: self.hf.specs[original] for name, original in self.ties.items()}
        names = {self.prefix + name.removeprefix(self.root): name for name in stored}
        specs = {
            key: TensorSpec(
                stored[name].shape if self.merged else flattened(name, stored[name].shape), stored[name].dtype
            )
            for key, name in names.items()
        }
        object.__setattr__(self, "specs", specs)
        object.__setattr__(self, "_names", names)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as DCP has it."""
        own, name = self.specs[name].shape, self._names[name]
        name = self.ties.get(name, name)
        shape = self.hf.specs[name].shape
        if own == shape:
            return self.hf.read(name, start, stop)
        rows = shape[1]
        first, last = start // rows, -(-stop // rows)
        value = self.hf.read(name, first, last).reshape(-1, shape[2])
        return value[start - first * rows : stop - first * rows]


@dataclass(frozen=True, slots=True)
class FromDcp:
    """DCP tensors under HF names and in HF shapes."""

    dcp: DcpFolder
    names: dict[str, str]
    """DCP name of each HF tensor."""
    specs: dict[str, TensorSpec]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as HF has it."""
        key = self.names[name]
        shape, stored = self.specs[name].shape, self.dcp.specs[key].shape
        rows = shape[1] if stored != shape else 1
        value = self.dcp.read(key, start * rows, stop * rows)
        return value.reshape(stop - start, *shape[1:]).to(self.specs[name].dtype) if shape else value


def flattened(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a DCP: fused experts lose their first axis, so that sharding by rows works with few experts."""
    if ".experts." in name and len(shape) == 3:
        return (shape[0] * shape[1], shape[2])
    return shape


def hf_to_dcp(
    source_folder: Path,
    target: Path,
    options: Options,
    *,
    style: Style = "2025",
    tie_weight: bool = False,
    merge_experts: bool = False,
) -> Summary:
    """Convert a HF folder to a DCP. With `tie_weight` a tied output layer is stored as well.

    With `merge_experts` experts that HF stores one by one become two tensors a layer.

    Raises:
        ConfigError, WeightMappingError, RunError: as `hf_to_megatron`; ConfigError too if there is nothing to merge.
    """
    source = open_source(source_folder, experts=options.experts)
    with source.checkpoint:
        if merge_experts and source.layout.experts != "per_expert":
            raise ConfigError(
                "there are no experts to merge", where=str(source_folder),
                expected="one tensor for each expert and projection", got=str(source.layout),
                fix="leave --merge-experts out",
            )  # fmt: skip
        hf = _merge(source) if merge_experts else source.checkpoint
        return _write_dcp(
            hf, source, target, options, style, tie_weight=tie_weight, kind="hf-to-dcp", merged=merge_experts
        )


def _merged_rules(source: Source) -> tuple[WeightRule, ...]:
    """The family's table for the same names with fused experts."""
    weights = family_part(source.architecture.family, "weights")
    return weights.weight_table(source.architecture, replace(source.layout, experts="fused"))


def _merge(source: Source) -> TensorSource:
    """A checkpoint's tensors with its experts merged: to Megatron's by one table, back by the other."""
    stored, rules = source.checkpoint.specs, _merged_rules(source)
    megatron = AsMegatron(source.checkpoint, source.rules)
    specs = {
        hf.name: TensorSpec(hf.shape, megatron.specs[rule.key].dtype) for rule in rules for hf in rule.sources
    }
    specs |= {copy.name: stored[copy.name] for rule in rules for copy in rule.copies if copy.name in stored}
    kept = Only(source.checkpoint, {name: stored[name] for name in source.untouched})
    return Joined((AsHf(megatron, rules, specs), kept), specs | kept.specs)


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


def from_dcp(folder: DcpFolder, template: Source, dtype: torch.dtype | None) -> TensorSource:
    """A DCP's tensors as those of a template, after comparing both in both directions.

    A tied output layer that only one of them stores is no difference.
    """
    wanted = {
        name: TensorSpec(spec.shape, dtype or spec.dtype) for name, spec in template.checkpoint.specs.items()
    }
    prefix = _merged_prefix(folder, template)
    if prefix is None:
        prefix = detect_prefix(folder, template)
        return _renamed(folder, template, wanted, {name: prefix + name for name in wanted})
    rules = _merged_rules(template)
    dtypes = {name: folder.specs[name].dtype for name in folder.specs}
    names = {
        hf.name: prefix + hf.name.removeprefix(template.layout.root) for rule in rules for hf in rule.sources
    }
    specs = {
        hf.name: TensorSpec(hf.shape, dtypes.get(names[hf.name], torch.float32))
        for rule in rules
        for hf in rule.sources
    }
    return as_template(AsMegatron(_renamed(folder, template, specs, names), rules), template, dtype)


def _merged_prefix(folder: DcpFolder, template: Source) -> str | None:
    """What stands before the names of a DCP whose experts were merged; None if they were not."""
    if template.layout.experts != "per_expert":
        return None
    fused = next(hf.name for rule in _merged_rules(template) for hf in rule.sources if ".experts." in hf.name)
    name = fused.removeprefix(template.layout.root)
    return next((prefix for prefix in PREFIXES.values() if prefix + name in folder.specs), None)


def _renamed(
    folder: DcpFolder, template: Source, specs: dict[str, TensorSpec], names: dict[str, str]
) -> FromDcp:
    """A DCP's tensors under HF names; all of `specs` must be there and, but for declared ones, nothing else.

    Args:
        folder: The DCP.
        template: The HF checkpoint: which tensors repeat others, which are not touched.
        specs: The HF tensors.
        names: DCP name of each.
    """
    copies = {copy.name: rule.sources[0].name for rule in template.rules for copy in rule.copies}
    found = {name for name in folder.specs if name.startswith("model.")}
    missing = sorted(name for name in specs.keys() - copies.keys() if names[name] not in found)
    declared = (*copies, *template.untouched)
    known = set(names.values()) | {
        prefix + name.removeprefix(root)
        for name in declared
        for prefix in PREFIXES.values()
        for root in ("", template.layout.root)
    }
    extra = sorted(found - known)
    misshapen = [
        f"{name} {folder.specs[names[name]].shape} instead of {spec.shape}"
        for name, spec in specs.items()
        if names[name] in found
        and folder.specs[names[name]].shape not in (spec.shape, flattened(name, spec.shape))
    ]
    problems = [("missing", missing), ("unexpected", extra), ("wrong shape", misshapen)]
    if missing or extra or misshapen:
        raise WeightMappingError(
            "the DCP does not fit the HF checkpoint", where=str(folder.folder), expected=f"{len(specs)} tensors",
            got="; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in problems if names),
            fix="give the HF checkpoint that the DCP was made from",
        )  # fmt: skip
    left_out = {name for name in specs.keys() & copies.keys() if names[name] not in found}
    return FromDcp(folder, names | {name: names[copies[name]] for name in left_out}, specs)


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
    merged: bool = False,
) -> Summary:
    stored = hf.specs
    copies = {copy.name: rule.sources[0].name for rule in source.rules for copy in rule.copies}
    ties = {name: original for name, original in copies.items() if tie_weight and name not in stored}
    root = source.layout.root if merged else ""
    view = AsDcp(cast(hf, options.dtype), PREFIXES[style], ties, root, merged)
    return write_shards_of(view, source, target, options, kind=kind, objects=VERSION_ENTRY, config=None)
