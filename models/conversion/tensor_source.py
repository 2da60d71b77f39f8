# SPDX-License-Identifier: Apache-2.0
"""Anything tensors can be read from by name and rows. A conversion is one of these, written down in some format.

safetensors folder ─┐                        ┌─▶ as Megatron (table) ─▶ torch_dist
DCP folder (HF names) ─┴─▶ HF names ─────────┤
torch_dist ─▶ as HF (table) ──┘              └─▶ as HF ─▶ safetensors, DCP
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from models.common.weight_rules import Shape, WeightRule
from models.contract.errors import WeightMappingError
from models.conversion.regions import read_hf_rows, read_megatron_rows


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and number format of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """Size of the first axis; one for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name, read by rows. Reading must be safe from several threads."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in a fixed order."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of a tensor, contiguous."""
        ...


@dataclass(frozen=True, slots=True)
class AsMegatron:
    """HF tensors seen as the Megatron tensors of a table."""

    hf: TensorSource
    rules: tuple[WeightRule, ...]
    dtype: torch.dtype | None = None
    """Number format of every tensor; None keeps that of the source."""
    specs: dict[str, TensorSpec] = field(init=False)
    _rules: dict[str, WeightRule] = field(init=False)

    def __post_init__(self) -> None:
        stored = self.hf.specs
        specs = {
            rule.key: TensorSpec(rule.shape, self.dtype or _common_dtype(rule, stored)) for rule in self.rules
        }
        object.__setattr__(self, "specs", specs)
        object.__setattr__(self, "_rules", {rule.key: rule for rule in self.rules})

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a Megatron tensor."""
        return read_megatron_rows(self._rules[name], start, stop, self.hf.read, self.specs[name].dtype)


@dataclass(frozen=True, slots=True)
class AsHf:
    """Megatron tensors of a table seen as HF tensors, with a template's names, shapes and number formats."""

    megatron: TensorSource
    rules: tuple[WeightRule, ...]
    specs: dict[str, TensorSpec]
    """Every tensor to provide, copies of tied tensors included."""
    _places: dict[str, tuple[WeightRule, int]] = field(init=False)

    def __post_init__(self) -> None:
        places = {
            source.name: (rule, index) for rule in self.rules for index, source in enumerate(rule.sources)
        }
        places |= {copy.name: (rule, 0) for rule in self.rules for copy in rule.copies}
        object.__setattr__(self, "_places", places)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a HF tensor."""
        rule, index = self._places[name]
        return read_hf_rows(rule, index, start, stop, self.megatron.read, self.specs[name].dtype)


@dataclass(frozen=True, slots=True)
class Joined:
    """Several sources with different names as one, in the order of `specs`."""

    parts: tuple[TensorSource, ...]
    specs: dict[str, TensorSpec]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows from the part that has the tensor."""
        part = next(part for part in self.parts if name in part.specs)
        return part.read(name, start, stop)


def _common_dtype(rule: WeightRule, stored: Mapping[str, TensorSpec]) -> torch.dtype:
    dtypes = {stored[source.name].dtype for source in rule.sources}
    if len(dtypes) > 1:
        raise WeightMappingError(
            "tensors that are joined have different number formats", where=rule.key,
            got=", ".join(sorted(str(dtype) for dtype in dtypes)), fix="pass --dtype to convert all of them",
        )  # fmt: skip
    return dtypes.pop()


def check_megatron_tensors(megatron: TensorSource, rules: tuple[WeightRule, ...], *, where: str) -> None:
    """Compare a Megatron checkpoint's tensors with a table, in both directions.

    Raises:
        WeightMappingError: tensors are missing, unexpected or misshapen. Vocabulary padding is allowed.
    """
    expected = {rule.key: rule for rule in rules}
    found = megatron.specs
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshapen = sorted(
        f"{name} {found[name].shape} instead of {rule.shape}"
        for name, rule in expected.items()
        if name in found and not _fits(found[name].shape, rule)
    )
    problems = [("missing", missing), ("unexpected", extra), ("wrong shape", misshapen)]
    if missing or extra or misshapen:
        raise WeightMappingError(
            "the Megatron checkpoint does not fit the model", where=where, expected=f"{len(expected)} tensors",
            got="; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in problems if names),
            fix="use the HF checkpoint of the same model (family and size) that training started from",
        )  # fmt: skip


def _fits(shape: Shape, rule: WeightRule) -> bool:
    if rule.pads_rows:
        return shape[0] >= rule.shape[0] and shape[1:] == rule.shape[1:]
    return shape == rule.shape


def few(names: list[str]) -> str:
    """The first names of a list, for an error message."""
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
