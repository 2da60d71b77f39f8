# SPDX-License-Identifier: Apache-2.0
"""Reading, writing and looking up baselines.

<directory>/<hardware>/<suite>/<case>.json      in force
<directory>/published/<name>.json               external reference points
<directory>/retired/<baseline_id>.json          what was replaced or withdrawn
<directory>/candidates/…                        proposed, not in force
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from harness.baselines.schema import SCHEMA_VERSION, Baseline, BaselineKey, content_id
from harness.devices import classify
from harness.records.record import REPORTED_TFLOPS, REPORTED_TOKENS, RunRecord
from models.contract.errors import BaselineError

MatchLevel = Literal["exact", "stack_drift", "other_seed", "other_hardware", "published", "none"]
CANDIDATES, RETIRED = "candidates", "retired"
NOT_IN_FORCE = frozenset({CANDIDATES, RETIRED})
STACK_KEYS = ("python", "driver", "cuda", "cudnn", "kernels")
STACK_PREFIX = "packages."
_SIGNATURE_TOLERANCE = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A baseline, and how closely it fits."""

    baseline: Baseline | None
    level: MatchLevel
    notes: tuple[str, ...] = ()


def load_baseline(path: Path) -> Baseline:
    """Read a baseline and check that it is what was accepted.

    Raises:
        BaselineError: missing, not JSON, another schema version, numbers that are not finite, or content that does not
            hash to its id (edited by hand).
    """
    data = _read_json(path)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BaselineError(
            "baseline has another schema version",
            where=str(path),
            expected=f"schema_version {SCHEMA_VERSION}",
            got=repr(version),
            fix="record it again with this version: `qwen-harness baseline propose`",
        )
    try:
        baseline = Baseline.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:5]
        ]
        raise BaselineError(
            f"baseline is malformed: {error.error_count()} problem(s)",
            where=str(path),
            got="; ".join(problems),
        ) from None
    found = content_id(data)
    if found != baseline.baseline_id:
        raise BaselineError(
            "baseline does not match its own hash: it was edited by hand, or damaged",
            where=str(path),
            expected=f"baseline_id {found}",
            got=baseline.baseline_id or "none",
            fix="restore it from git; new values come in through `qwen-harness baseline propose` and `accept`",
        )
    return baseline


def write_baseline(baseline: Baseline, path: Path) -> None:
    """Write a sealed baseline to a path that does not exist yet, and read it back before it counts.

    Raises:
        BaselineError: there is already a file.
    """
    if path.exists():
        raise BaselineError(
            "a baseline is already there and is never overwritten",
            where=str(path),
            fix="accept a proposal that supersedes it, or retire it first",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(_readable(baseline.model_dump(mode="json")) + "\n", encoding="utf-8")
    load_baseline(partial)
    partial.replace(path)


def baseline_path(directory: Path, key: BaselineKey) -> Path:
    """Where a baseline in force stands."""
    return directory / key.hardware / key.suite / f"{key.case}.json"


def baselines_in_force(directory: Path) -> list[Path]:
    """Files of all baselines that a look-up may return, sorted."""
    return sorted(
        file for file in directory.rglob("*.json") if file.relative_to(directory).parts[0] not in NOT_IN_FORCE
    )


def find_for_case(directory: Path, *, suite: str, case: str, hardware: str, record: RunRecord) -> Match:
    """Look up the baseline of a case, strict to loose.

    Same recipe and hardware (exact, or stack_drift when package versions differ); same recipe but for the seed; same
    recipe on another hardware class, if exactly one class has it; a published reference with the record's signature.

    Raises:
        BaselineError: a file that would be used is malformed.
    """
    notes: list[str] = []
    own = baseline_path(directory, BaselineKey(suite=suite, case=case, recipe_sha="", hardware=hardware))
    if own.is_file():
        baseline = load_baseline(own)
        if level := _recipe_level(baseline, record):
            return Match(baseline=baseline, level=level)
        notes.append(_recipe_changed(baseline, record))
    others = [
        file
        for file in sorted(directory.glob(f"*/{suite}/{case}.json"))
        if file != own and file.relative_to(directory).parts[0] not in NOT_IN_FORCE
    ]
    fitting = [item for item in map(load_baseline, others) if _recipe_level(item, record)]
    if len(fitting) == 1:
        return Match(baseline=fitting[0], level="other_hardware", notes=tuple(notes))
    if fitting:
        classes = ", ".join(item.key.hardware for item in fitting)
        notes.append(f"baselines on several other hardware classes ({classes}): name one to compare with it")
    published = find_published(directory, record)
    return Match(baseline=published.baseline, level=published.level, notes=(*notes, *published.notes))


def find_for_record(directory: Path, record: RunRecord, *, hardware: str | None = None) -> Match:
    """Look up by the record alone: its recipe hash and hardware class; a foreign log by its signature.

    Raises:
        BaselineError: two baselines fit equally well, or a file is malformed.
    """
    if record.info is None:
        return find_published(directory, record)
    hardware = hardware or hardware_of(record)
    loaded = [load_baseline(file) for file in baselines_in_force(directory)]
    fitting = [item for item in loaded if item.key.recipe_sha == record.info.recipe_sha]
    same = [item for item in fitting if item.key.hardware == hardware]
    if len(same) > 1:
        raise BaselineError(
            "two baselines fit this run",
            got=", ".join(f"{item.key.suite}/{item.key.case}" for item in same),
            fix="name one",
        )
    if same:
        return Match(baseline=same[0], level=_recipe_level(same[0], record) or "exact")
    if len(fitting) == 1:
        return Match(baseline=fitting[0], level="other_hardware")
    return find_published(directory, record)


def find_published(directory: Path, record: RunRecord) -> Match:
    """A published reference with the same planned iterations, batch size and FLOPs per padded token."""
    fitting: list[Baseline] = []
    for file in sorted((directory / "published").glob("*.json")):
        baseline = load_baseline(file)
        if _has_signature(baseline.facts, record):
            fitting.append(baseline)
    if len(fitting) == 1:
        return Match(baseline=fitting[0], level="published", notes=(published_note(fitting[0]),))
    if fitting:
        names = ", ".join(item.key.case for item in fitting)
        return Match(baseline=None, level="none", notes=(f"several published references fit: {names}",))
    return Match(baseline=None, level="none")


def published_note(baseline: Baseline) -> str:
    """What a reader must know about a published reference."""
    return f"published reference, not measured here: {baseline.facts.get('caveat', baseline.because)}"


def hardware_of(record: RunRecord) -> str | None:
    """Hardware class that the run's own probe found; None when the source does not tell or the device is unknown."""
    probe = record.info.hardware if record.info else {}
    if probe.get("kind") == "cpu":
        return "cpu"
    return classify(str(probe["device_name"])) if probe.get("device_name") else None


def stack_differences(baseline: Baseline, record: RunRecord) -> dict[str, tuple[str, str]]:
    """Versions that differ, as (baseline, run). Only what both name."""
    ours, theirs = flat(record.info.environment if record.info else {}), flat(baseline.environment)
    names = [name for name in theirs if name in STACK_KEYS or name.startswith(STACK_PREFIX)]
    return {
        name: (str(theirs[name]), str(ours[name]))
        for name in names
        if name in ours and ours[name] != theirs[name]
    }


def _recipe_level(
    baseline: Baseline, record: RunRecord
) -> Literal["exact", "stack_drift", "other_seed"] | None:
    if record.info is None:
        return None
    if baseline.key.recipe_sha == record.info.recipe_sha:
        return "stack_drift" if stack_differences(baseline, record) else "exact"
    return "other_seed" if _changed_keys(baseline.recipe, record.recipe) == ["train.seed"] else None


def _recipe_changed(baseline: Baseline, record: RunRecord) -> str:
    keys = _changed_keys(baseline.recipe, record.recipe)
    return (
        f"the baseline of this case is for another recipe ({baseline.key.recipe_sha}): "
        f"{', '.join(keys[:8]) or 'the keys are the same, the hash is not'}"
    )


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    left, right = flat(old), flat(new)
    ignored = (
        "name",
        "description",
        "notes",
        "hardware",
        "checkpoint.",
        "train.log_interval",
        "train.manual_gc",
    )
    return sorted(
        key
        for key in left.keys() | right.keys()
        if left.get(key) != right.get(key) and not key.startswith(ignored)
    )


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots."""
    rows: dict[str, Any] = {}
    for key, value in data.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def _has_signature(facts: dict[str, Any], record: RunRecord) -> bool:
    if record.planned_iterations != facts.get("train_iters") or record.series.empty:
        return False
    if record.has("global_batch_size") and set(record.values("global_batch_size")) != {
        facts.get("global_batch_size")
    }:
        return False
    flops = flops_per_padded_token(record)
    expected = facts.get("flops_per_padded_token")
    return flops is None or expected is None or abs(flops / expected - 1.0) < _SIGNATURE_TOLERANCE


def flops_per_padded_token(record: RunRecord) -> float | None:
    """Megatron's FLOPs for one padded token: a fingerprint of model and sequence length. None if it cannot be told."""
    if record.has(REPORTED_TFLOPS) and record.has(REPORTED_TOKENS):
        ratio = record.series[REPORTED_TFLOPS] * 1e12 / record.series[REPORTED_TOKENS]
    elif record.has("megatron_flops") and record.has("num_padded_tokens"):
        ratio = record.series["megatron_flops"] / record.series["num_padded_tokens"]
    else:
        return None
    values = ratio.to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise BaselineError("no such baseline", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise BaselineError(
            "baseline is not whole JSON", where=str(path), got=str(error), fix="restore it from git"
        ) from None
    if not isinstance(data, dict):
        raise BaselineError("baseline is not a JSON object", where=str(path), got=type(data).__name__)
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"holds the number {name}")


def _readable(value: Any, indent: int = 0) -> str:
    """JSON with objects spread out and each array of numbers on one line."""
    pad = " " * indent
    if isinstance(value, dict) and value:
        rows = [f"{pad} {json.dumps(key)}: {_readable(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        rows = [f"{pad} {_readable(item, indent + 1)}" for item in value]
        return "[\n" + ",\n".join(rows) + f"\n{pad}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
