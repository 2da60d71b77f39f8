# SPDX-License-Identifier: Apache-2.0
"""How well the same work a device is done on more devices: 1.0 where eight are eight times as fast as one. Pure.

Runs belong together when their recipes differ in nothing but `num_processes` and `train.global_batch_size`, each device
has the same work in a step, and all ran on the same class and kind of device.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from harness.baselines.store import hardware_of
from harness.records import RunRecord
from harness.report.numbers import throughput
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, parse_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """One number of devices; rates are means over its runs."""

    world_size: int
    num_runs: int
    padded_tokens_per_second: float
    """A device."""
    real_tokens_per_second: float | None
    """A device; None where a run does not tell real tokens."""
    efficiency: float
    """Padded tokens a second and device, over those on the smallest number of devices."""
    real_efficiency: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The same work a device on several numbers of devices, the smallest first."""

    names: tuple[str, ...]
    """Of the recipes, as the rows come."""
    hardware: str
    device_name: str
    rows: tuple[ScalingRow, ...]

    def faults(self, floor: float) -> list[str]:
        """What keeps the claim "at least `floor` from one device to all" from being true, one text each."""
        first = self.rows[0]
        found = []
        if first.world_size != 1:
            found.append(f"{self.names[0]}: no run on one device, the smallest is on {first.world_size}")
        if len(self.rows) == 1:
            found.append(f"{self.names[0]}: no run on more than {first.world_size} device(s) to compare with")
        found += [
            f"{name}: {row.efficiency:.1%} on {row.world_size} devices, at least {floor:.0%} is asked for "
            f"({row.padded_tokens_per_second:.0f} padded tokens/s a device, {first.padded_tokens_per_second:.0f} on "
            f"{first.world_size})"
            for name, row in zip(self.names, self.rows, strict=True)
            if not row.efficiency >= floor
        ]
        return found


def scaling_key(recipe: Recipe) -> str:
    """What recipes of one scaling have in common, as canonical JSON: all but how many devices share the work."""
    data = recipe.what_changes_numbers()
    del data["num_processes"], data["train"]["global_batch_size"]
    data["rows_a_device"] = recipe.train.global_batch_size / recipe.num_processes
    return json.dumps(data, sort_keys=True)


def scalings(records: Iterable[RunRecord]) -> list[Scaling]:
    """Group runs that may be compared, and compare them; a group may turn out to be one number of devices alone.

    Runs without a recipe of this version (foreign logs) or without steady steps belong to no group.
    """
    groups: dict[tuple[str, str, str], dict[int, list[RunRecord]]] = {}
    for record in records:
        if record.info is None or _rates(record) is None:
            continue
        try:
            recipe = parse_recipe(record.recipe, where=record.source)
        except ConfigError:  # grading says so
            continue
        key = (scaling_key(recipe), hardware_of(record) or "unknown", _device_name(record))
        groups.setdefault(key, {}).setdefault(record.info.world_size, []).append(record)
    return [
        Scaling(
            names=tuple(str(runs[0].recipe["name"]) for _, runs in sorted(by_size.items())),
            hardware=hardware, device_name=device_name, rows=_rows(by_size),
        )
        for (_, hardware, device_name), by_size in groups.items()
    ]  # fmt: skip


def _rows(by_size: dict[int, list[RunRecord]]) -> tuple[ScalingRow, ...]:
    rows: list[ScalingRow] = []
    for world_size, runs in sorted(by_size.items()):
        rates = [found for run in runs if (found := _rates(run)) is not None]
        padded = fmean(rate for rate, _ in rates)
        reals = [rate for _, rate in rates if rate is not None]
        real = fmean(reals) if len(reals) == len(rates) else None
        first = rows[0] if rows else None
        base = first.real_tokens_per_second if first else real
        rows.append(
            ScalingRow(
                world_size=world_size, num_runs=len(runs), padded_tokens_per_second=padded,
                real_tokens_per_second=real,
                efficiency=padded / (first.padded_tokens_per_second if first else padded),
                real_efficiency=real / base if real and base else None,
            )
        )  # fmt: skip
    return tuple(rows)


def _rates(record: RunRecord) -> tuple[float, float | None] | None:
    """Padded and real tokens a second and device over the steady part; None where there is none."""
    found = throughput(record.series, world_size=record.world_size or 1, hardware=None)
    if found is None or found.padded_tokens_per_second is None:
        return None
    return found.padded_tokens_per_second, found.real_tokens_per_second


def _device_name(record: RunRecord) -> str:
    """As the driver calls it; runs on a CPU are told apart by the processor."""
    assert record.info is not None
    facts = record.info.hardware
    return str(facts.get("cpu_model" if facts.get("kind") == "cpu" else "device_name", ""))
