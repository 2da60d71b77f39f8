# SPDX-License-Identifier: Apache-2.0
"""The run directory: the only thing that training hands to the harness.

    run.json        RunInfo: resolved recipe, environment, data-order digest, outcome
    metrics.jsonl   StepMetrics, one object an iteration, full float precision
    train.log       Megatron's line format, for people and other tools
    checkpoints/

Every write leaves a readable directory: ``run.json`` is replaced atomically, ``metrics.jsonl`` grows line by line.
Non-finite numbers are written as the strings "nan", "inf", "-inf", so that the files stay valid JSON.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.contract.errors import RunError
from models.contract.whole_file import write_whole

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
"""Held while a training runs in the directory."""
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"

RunStatus = Literal["running", "completed", "interrupted", "failed"]


class RunOutcome(BaseModel):
    """How a run ended."""

    model_config = ConfigDict(extra="forbid")
    status: RunStatus = "running"
    iteration: int = 0
    """Last iteration that finished."""
    error: str | None = None
    phase: Literal["startup", "training", "saving", "done"] = "startup"


class RunInfo(BaseModel):
    """``run.json``."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    run_id: str
    recipe: dict[str, Any]
    recipe_sha: str
    family: str
    command: list[str]
    started_at: str
    """ISO 8601, UTC."""
    ended_at: str | None = None
    world_size: int
    layout: dict[str, int] = Field(default_factory=dict)
    """tp, pp, cp, ep, etp, dp, vpp."""
    hardware: dict[str, Any] = Field(default_factory=dict)
    """Probe: kind (cpu, cuda, npu), device_name, device_count, memory_bytes, cpu_model, num_cores, num_threads."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Fingerprint: versions, commit, dirty flag, driver, determinism variables, patches in force."""
    checkpoint_fingerprint: str | None = None
    dataset_fingerprint: str | None = None
    data_order_digest: str | None = None
    """sha256 over the sample digests of all steps so far, in order."""
    num_parameters: dict[str, int] = Field(default_factory=dict)
    """total, trainable, language, vision, audio."""
    sample_counts: dict[str, int] = Field(default_factory=dict)
    """consumed, skipped and skipped:<reason>."""
    skipped_samples: list[dict[str, str]] = Field(default_factory=list)
    """First hundred: file, key, reason."""
    outcome: RunOutcome = Field(default_factory=RunOutcome)


class StepMetrics(BaseModel):
    """One line of ``metrics.jsonl``. Counts are of the whole global batch, over all ranks."""

    model_config = ConfigDict(extra="forbid")
    iteration: int
    consumed_train_samples: int
    lm_loss: float
    """Reported loss: sum of token losses over sum of supervised tokens (per_token), or mean of sample means."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    loss_scale: float = 1.0
    global_batch_size: int
    step_time_ms: float
    data_time_ms: float = 0.0
    forward_backward_time_ms: float = 0.0
    optimizer_time_ms: float = 0.0
    num_padded_tokens: int
    """Tokens the decoder ran over, padding included."""
    num_real_tokens: int
    """Tokens that are not padding, vision tokens included."""
    num_supervised_tokens: int
    num_vision_tokens: int = 0
    """Merged vision tokens, as the decoder sees them."""
    num_images: int = 0
    num_videos: int = 0
    num_audios: int = 0
    num_skipped_iterations: int = 0
    num_nan_iterations: int = 0
    peak_memory_bytes: int = 0
    """Largest over ranks; 0 where it is not measured."""
    sample_digest: str = ""
    """First 16 hex digits of the sha256 over this step's sample keys of all ranks, sorted: no layout changes it."""
    megatron_flops: float = 0.0
    """FLOPs of this step by Megatron's formula: decoder only, padded (`megatron_lm_padded`)."""
    model_flops: float = 0.0
    """FLOPs of this step over real tokens with the vision and audio towers (`model_real`)."""
    eval_lm_loss: float | None = None
    extra: dict[str, float] = Field(default_factory=dict)
    """Auxiliary losses and the like."""


def to_json_number(value: Any) -> Any:
    """Make a float JSON-safe; containers are walked."""
    if isinstance(value, dict):
        return {key: to_json_number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_number(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def write_run_info(directory: Path, info: RunInfo) -> None:
    """Replace ``run.json`` atomically."""
    text = json.dumps(to_json_number(info.model_dump(mode="json")), indent=1, ensure_ascii=False)
    write_whole(directory / RUN_FILE, text + "\n", is_shared=True)  # ranks that fail together write together


def append_metrics(directory: Path, step: StepMetrics) -> None:
    """Append one iteration to ``metrics.jsonl``, whole line at a time."""
    line = json.dumps(to_json_number(step.model_dump(mode="json")), ensure_ascii=False)
    with (directory / METRICS_FILE).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def read_run_info(directory: Path) -> RunInfo:
    """Read ``run.json``. Raises OSError or pydantic's ValidationError; the harness words them."""
    return RunInfo.model_validate_json((directory / RUN_FILE).read_text(encoding="utf-8"))


def load_run_info(directory: Path) -> RunInfo:
    """Read ``run.json``.

    Raises:
        RunError: it is missing or cannot be read.
    """
    try:
        return read_run_info(directory)
    except ValidationError as error:
        got = "; ".join(
            f"{'.'.join(map(str, row['loc']))} {row['msg']}".strip() for row in error.errors()[:5]
        )
    except (OSError, UnicodeDecodeError) as error:
        got = str(error)
    raise RunError(
        "run.json cannot be read", where=str(directory / RUN_FILE), expected="what training wrote", got=got,
        fix="put the file back as it was",
    )  # fmt: skip


def load_metrics(directory: Path, keys: Iterable[str]) -> dict[int, dict[str, Any]]:
    """Rows of ``metrics.jsonl`` by iteration; a torn last line is left out.

    Raises:
        RunError: a line is no JSON object, or lacks one of the keys.
    """
    found: dict[int, dict[str, Any]] = {}
    wanted = {"iteration", *keys}
    try:
        for row in iter_metrics(directory):
            missing = sorted(wanted - row.keys())
            if missing:
                raise ValueError(f"no {', '.join(missing)}")
            found[row["iteration"]] = row
    except (ValueError, AttributeError) as error:
        raise RunError(
            "metrics.jsonl cannot be read",
            where=f"{directory / METRICS_FILE}, the line after iteration {max(found, default=0)}",
            expected=f"a JSON object with {', '.join(sorted(wanted))}", got=str(error),
            fix="put the file back as it was",
        ) from None  # fmt: skip
    return found


def iter_metrics(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the raw objects of ``metrics.jsonl``; a torn last line is left out."""
    path = directory / METRICS_FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)
