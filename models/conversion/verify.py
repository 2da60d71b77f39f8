# SPDX-License-Identifier: Apache-2.0
"""Compare two checkpoints tensor by tensor and bit by bit, whatever format each of them has."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.common.weight_rules import ExpertLayout, WeightRule
from models.contract.errors import ConfigError
from models.conversion.checkpoint_folder import INDEX_FILE, SINGLE_FILE
from models.conversion.dcp_folder import METADATA_FILE, TRACKER_FILE, find_iteration, model_weights, open_dcp
from models.conversion.sinks import row_blocks
from models.conversion.source import Source, open_source
from models.conversion.tensor_source import AsMegatron, TensorSource, TensorSpec

WORST = 10


@dataclass(frozen=True, slots=True)
class TensorRow:
    """How one tensor compares. Differences are in elements and in absolute value (0.0 where nothing can be said)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    checksum: str
    other_checksum: str
    equal: bool
    num_different: int
    max_difference: float
    not_finite: int
    detail: str


def verify(
    left: Path,
    right: Path,
    *,
    workers: int = 2,
    experts: ExpertLayout | None = None,
    cast: bool = False,
    on_start: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Compare two checkpoint folders: HF against HF, Megatron against Megatron, or one of each.

    A HF folder is compared with a Megatron checkpoint as Megatron tensors, through its table.

    Args:
        left: What is expected.
        right: What is checked.
        workers: Threads.
        experts: Layout of fused experts, where shapes cannot tell.
        cast: Compare values after converting `left` to `right`'s number format, instead of refusing another one.
        on_start: Told the bytes to compare.
        advance: Told the bytes of every block.

    Returns: A JSON-able report: counts, `different`, `missing`, `unexpected`, the `worst` ten, `declared` (tied
    tensors, padded rows) and a row for every tensor.

    Raises:
        ConfigError: a folder holds no checkpoint.
        WeightMappingError: a checkpoint is broken or does not fit its table.
    """
    with _open_both(left, right, experts) as (a, b, declared, padded):
        names = [name for name in a.specs if name in b.specs]
        on_start(sum(a.specs[name].num_bytes for name in names))
        with ThreadPoolExecutor(max_workers=workers) as pool:
            rows = list(
                pool.map(lambda name: _compare(name, a, b, padded, cast=cast, advance=advance), names)
            )
        missing = sorted(a.specs.keys() - b.specs.keys() - declared.keys())
        unexpected = sorted(b.specs.keys() - a.specs.keys() - declared.keys())
        return _report(left, right, rows, missing, unexpected, declared)


def _report(
    left: Path,
    right: Path,
    rows: list[TensorRow],
    missing: list[str],
    unexpected: list[str],
    declared: dict[str, str],
) -> dict[str, Any]:
    different = sorted((row for row in rows if not row.equal), key=lambda row: (-row.num_different, row.name))
    return {
        "name": f"{left.name} and {right.name}",
        "left": str(left),
        "right": str(right),
        "is_equal": not (different or missing or unexpected),
        "num_tensors": len(rows),
        "num_equal": len(rows) - len(different),
        "num_bytes": sum(row.num_bytes for row in rows),
        "different": [{"name": row.name, "detail": row.detail} for row in different],
        "missing": missing,
        "unexpected": unexpected,
        "declared": declared,
        "not_finite": [row.name for row in rows if row.not_finite],
        "worst": [asdict(row) for row in different[:WORST]],
        "tensors": [asdict(row) for row in rows],
    }


def _compare(
    name: str,
    a: TensorSource,
    b: TensorSource,
    padded: dict[str, int],
    *,
    cast: bool,
    advance: Callable[[int], None],
) -> TensorRow:
    spec, other = a.specs[name], b.specs[name]
    rows = padded.get(name, spec.num_rows)
    same_shape = (
        (rows, *spec.shape[1:]) == (rows, *other.shape[1:])
        and other.num_rows >= rows
        and len(spec.shape) == len(other.shape)
    )
    if name not in padded:
        same_shape = spec.shape == other.shape
    problems = []
    if not same_shape:
        problems.append(f"shape {spec.shape} against {other.shape}")
    if spec.dtype != other.dtype and not cast:
        problems.append(f"{spec.dtype} against {other.dtype}")
    digests = (hashlib.sha256(), hashlib.sha256())
    num_different = not_finite = 0
    max_difference = 0.0
    for span in row_blocks(name, TensorSpec((rows, *spec.shape[1:]), spec.dtype) if spec.shape else spec):
        mine = a.read(name, span.start, span.stop).contiguous()
        digests[0].update(_bytes(mine))
        advance(mine.nbytes)
        if mine.is_floating_point():
            not_finite += int((~torch.isfinite(mine)).sum())
        if not same_shape:
            continue
        theirs = b.read(name, span.start, span.stop).contiguous()
        digests[1].update(_bytes(theirs))
        mine = mine.to(theirs.dtype)
        differs = (mine.view(torch.uint8) != theirs.view(torch.uint8)).reshape(mine.numel(), -1).any(dim=1)
        if bool(differs.any()):
            num_different += int(differs.sum())
            gap = (mine.double() - theirs.double()).abs().nan_to_num(float("inf"), float("inf"))
            max_difference = max(max_difference, float(gap.max()))
    if num_different:
        share = num_different / max(1, torch.Size(spec.shape).numel())
        problems.append(f"{num_different} elements differ ({share:.2%}), by up to {max_difference:.3g}")
    return TensorRow(
        name=name, shape=spec.shape, dtype=str(spec.dtype).removeprefix("torch."), num_bytes=spec.num_bytes,
        checksum=digests[0].hexdigest(), other_checksum=digests[1].hexdigest() if same_shape else "",
        equal=not problems, num_different=num_different, max_difference=max_difference, not_finite=not_finite,
        detail="; ".join(problems),
    )  # fmt: skip


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def _open_both(
    left: Path, right: Path, experts: ExpertLayout | None
) -> Iterator[tuple[TensorSource, TensorSource, dict[str, str], dict[str, int]]]:
    """Both sides as sources with the same names, what differs by declaration, and real rows of padded tensors."""
    with contextlib.ExitStack() as stack:
        kinds = [_kind(folder) for folder in (left, right)]
        opened: list[Any] = []
        for folder, kind in zip((left, right), kinds, strict=True):
            if kind == "hf":
                source = open_source(folder, experts=experts)
                stack.enter_context(source.checkpoint)
                opened.append(source)
            else:
                megatron = open_dcp(find_iteration(folder), check_bytes=False)  # differences are to be listed
                opened.append(model_weights(stack.enter_context(megatron)))
        tables = [source for source in opened if isinstance(source, Source)]
        if len(tables) == 1:
            table = tables[0]
            sides = [AsMegatron(s.checkpoint, s.rules) if isinstance(s, Source) else s for s in opened]
            yield sides[0], sides[1], _declared(table), _padded(table.rules, sides)
            return
        sides = [s.checkpoint if isinstance(s, Source) else s for s in opened]
        declared: dict[str, str] = {}
        for source in tables:
            declared |= {
                copy.name: f"tied to {rule.sources[0].name}" for rule in source.rules for copy in rule.copies
            }
        both = {name: why for name, why in declared.items() if not all(name in side.specs for side in sides)}
        yield sides[0], sides[1], both, {}


def _declared(table: Source) -> dict[str, str]:
    kept = dict.fromkeys(table.untouched, "not mapped: export copies it")
    return kept | {name: f"tied to {rule.sources[0].name}" for name, rule in table.copies.items()}


def _padded(rules: tuple[WeightRule, ...], sides: Sequence[TensorSource]) -> dict[str, int]:
    return {
        rule.key: rule.shape[0]
        for rule in rules
        if rule.pads_rows
        and any(rule.key in s.specs and s.specs[rule.key].shape != rule.shape for s in sides)
    }


def _kind(folder: Path) -> str:
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return "hf"
    roots = (folder / METADATA_FILE, folder / TRACKER_FILE, folder / "checkpoints" / TRACKER_FILE)
    if any(path.is_file() for path in roots):
        return "megatron"
    raise ConfigError(
        "no checkpoint found", where=str(folder),
        expected=f"{SINGLE_FILE}, {INDEX_FILE}, {METADATA_FILE} or {TRACKER_FILE}",
    )  # fmt: skip
