# SPDX-License-Identifier: Apache-2.0
"""The baseline file, and how records of runs become one."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.calibration import Calibration, calibrate
from harness.records.record import NUMBER_COLUMNS, REPORTED_TFLOPS, REPORTED_TOKENS, RunRecord
from models.contract.errors import BaselineError

if TYPE_CHECKING:
    import pandas as pd

    from harness.policy import Policy

SCHEMA_VERSION = 1
ID_HEX_DIGITS = 16
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
STORED_COLUMNS = (*NUMBER_COLUMNS, REPORTED_TFLOPS, REPORTED_TOKENS)
REASONS = ("new-hw", "stack-bump", "recipe-change", "bugfix", "improvement", "first")
Reason = Literal["new-hw", "stack-bump", "recipe-change", "bugfix", "improvement", "first"]
JudgedGate = Literal["throughput"]


class BaselineKey(BaseModel):
    """What a baseline is for."""

    model_config = STRICT
    suite: str
    case: str
    recipe_sha: str
    """Hash of the resolved recipe; empty for a published reference, whose recipe nobody has."""
    hardware: str
    """Class from the probe (harness.hardware); `unknown` for a published reference."""


class BaselineRun(BaseModel):
    """One launch, at full precision."""

    model_config = STRICT
    run_id: str
    started_at: str = ""
    ended_at: str = ""
    data_order_digest: str = ""
    checkpoint_fingerprint: str = ""
    dataset_fingerprint: str = ""
    world_size: int | None = None
    device_name: str = ""
    environment: dict[str, Any] = {}
    machine: dict[str, float] = {}
    """What its sentinel measured (harness.records.machine)."""
    iterations: tuple[int, ...]
    columns: dict[str, tuple[float | None, ...]]
    """By column of the series; null where a step has no value."""
    sample_digests: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        size = len(self.iterations)
        for name, values in self.columns.items():
            if len(values) != size:
                raise ValueError(f"run {self.run_id}: {name} has {len(values)} values for {size} iterations")
        if self.sample_digests and len(self.sample_digests) != size:
            raise ValueError(f"run {self.run_id}: {len(self.sample_digests)} digests for {size} iterations")
        if list(self.iterations) != sorted(set(self.iterations)):
            raise ValueError(f"run {self.run_id}: iterations are not ascending and unique")
        return self

    def frame(self) -> pd.DataFrame:
        """Columns by iteration, null as NaN."""
        import pandas as pd

        index = pd.Index(self.iterations, dtype="int64", name="iteration")
        return pd.DataFrame(self.columns, index=index, dtype="float64")


class Baseline(BaseModel):
    """The file."""

    model_config = STRICT
    schema_version: int = SCHEMA_VERSION
    baseline_id: str = ""
    """Hash of everything else in the file."""
    origin: Literal["measured", "published"] = "measured"
    key: BaselineKey
    supersedes: str | None = None
    anchor_id: str | None = None
    """Oldest baseline of the chain; None means this one is."""
    reason: Reason = "first"
    because: str = ""
    author: str = ""
    created_at: str
    policy_version: int
    recipe: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    """Fingerprint of the stack; what the runs share."""
    facts: dict[str, Any] = {}
    """What a published reference states: source, seq_length, flops_per_padded_token, …"""
    calibration: Calibration | None = None
    report_only: tuple[JudgedGate, ...] = ()
    """Gates that say what they find without judging: the launches differ too much for their margins."""
    runs: tuple[BaselineRun, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {self.schema_version}: this harness reads {SCHEMA_VERSION}")
        return self

    def has(self, column: str) -> bool:
        """Whether every run has this column, with a value somewhere."""
        return all(
            column in run.columns and any(value is not None for value in run.columns[column])
            for run in self.runs
        )

    def frames(self) -> list[pd.DataFrame]:
        """One frame a run."""
        return [run.frame() for run in self.runs]

    @property
    def anchor(self) -> str:
        """Id of the oldest baseline of the chain."""
        return self.anchor_id or self.baseline_id


def content_id(data: dict[str, Any]) -> str:
    """Hash of a baseline's content, its own id left out."""
    content = {key: value for key, value in data.items() if key != "baseline_id"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_HEX_DIGITS]


def sealed(baseline: Baseline) -> Baseline:
    """The same baseline with its id filled in. Raises BaselineError for numbers that are not finite."""
    data = baseline.model_dump(mode="json")
    try:
        data["baseline_id"] = content_id(data)
        text = json.dumps(data, allow_nan=False)
    except ValueError:
        raise BaselineError(
            "a baseline holds a number that is not finite", where=baseline.key.case, fix="drop that run"
        ) from None
    return Baseline.model_validate_json(text)


def baseline_of_records(
    records: list[RunRecord],
    *,
    key: BaselineKey,
    policy: Policy,
    created_at: str,
    chain: dict[str, Any] | None = None,
) -> Baseline:
    """Make a sealed baseline of one or more records.

    Args:
        records: Launches of one recipe on one hardware class; their soundness is the caller's business.
        key: What the baseline is for.
        policy: Supplies window and confidence of the calibration.
        created_at: ISO 8601, UTC.
        chain: supersedes, anchor_id, reason, because, author.

    Raises:
        BaselineError: a record has no iterations, or values that are not finite.
    """
    for record in records:
        if record.series.empty:
            raise BaselineError("a record without iterations is no baseline", where=record.source)
    runs = tuple(_run_of_record(record) for record in records)
    return sealed(
        Baseline(
            key=key,
            created_at=created_at,
            policy_version=policy.version,
            recipe=records[0].recipe,
            environment=_shared([record.info.environment if record.info else {} for record in records]),
            calibration=calibrate(
                [run.frame() for run in runs], [run.data_order_digest for run in runs], policy
            ),
            runs=runs,
            **(chain or {}),
        )
    )


def _run_of_record(record: RunRecord) -> BaselineRun:
    columns = {
        name: tuple(_cell(value, name, record) for value in record.series[name])
        for name in STORED_COLUMNS
        if record.has(name) and name in record.series
    }
    info = record.info
    has_digests = record.has("sample_digest") and bool(record.series["sample_digest"].astype(bool).all())
    return BaselineRun(
        run_id=info.run_id if info else record.source,
        started_at=info.started_at if info else "",
        ended_at=(info.ended_at or "") if info else "",
        data_order_digest=(info.data_order_digest or "") if info else "",
        checkpoint_fingerprint=(info.checkpoint_fingerprint or "") if info else "",
        dataset_fingerprint=(info.dataset_fingerprint or "") if info else "",
        world_size=record.world_size,
        device_name=device_name(record),
        environment=info.environment if info else {},
        machine=record.machine.rates(),
        iterations=tuple(int(value) for value in record.series.index),
        columns=columns,
        sample_digests=tuple(record.series["sample_digest"]) if has_digests else (),
    )


def device_name(record: RunRecord) -> str:
    """What the probe called the device; the CPU model on a CPU; empty when the source does not tell."""
    hardware = record.info.hardware if record.info else {}
    name = hardware.get("cpu_model") if hardware.get("kind") == "cpu" else hardware.get("device_name")
    return str(name or "")


def _cell(value: float, column: str, record: RunRecord) -> float | None:
    if math.isnan(value) and column in {"eval_lm_loss", REPORTED_TFLOPS, REPORTED_TOKENS}:
        return None
    if not math.isfinite(value):
        raise BaselineError(
            "a baseline may not hold a number that is not finite",
            where=f"{record.source}, {column}",
            got=str(value),
            fix="drop that run",
        )
    return float(value)


def _shared(environments: list[dict[str, Any]]) -> dict[str, Any]:
    """What all environments say alike; a nested table is shared key by key."""
    first = environments[0]
    shared: dict[str, Any] = {}
    for key, value in first.items():
        others = [environment.get(key) for environment in environments]
        if isinstance(value, dict) and all(isinstance(other, dict) for other in others):
            shared[key] = _shared([environment[key] for environment in environments])
        elif all(other == value for other in others):
            shared[key] = value
    return shared
