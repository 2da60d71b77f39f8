# SPDX-License-Identifier: Apache-2.0
"""The tolerance policy: ``policy.toml`` in, strict frozen settings out."""

import json
import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.contract.errors import ConfigError

POLICY_FILE = Path(__file__).with_name("policy.toml")
POLICY_VERSION = 1
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SanityPolicy(BaseModel):
    """C0."""

    model_config = STRICT
    max_skipped_iterations: int = Field(ge=0)
    max_nan_iterations: int = Field(ge=0)
    learning_rate_tolerance: float = Field(gt=0, lt=0.1)


class FirstForwardPolicy(BaseModel):
    """C1."""

    model_config = STRICT
    margin_same_hardware: float = Field(gt=0, lt=1)
    margin_other_hardware: float = Field(gt=0, lt=1)
    margin_reference: float = Field(gt=0, lt=1)


class FirstStepsPolicy(BaseModel):
    """C2."""

    model_config = STRICT
    num_iterations: int = Field(ge=2)
    mean_abs_margin: float = Field(gt=0, lt=1)
    mean_margin: float = Field(gt=0, lt=1)
    grad_norm_margin: float = Field(gt=0, lt=1)


class EndWindowPolicy(BaseModel):
    """C3."""

    model_config = STRICT
    num_iterations: int = Field(ge=10)
    margin: float = Field(gt=0, lt=1)
    min_references_unpaired: int = Field(ge=2)
    other_hardware_factor: float = Field(ge=1)


class LiteralPolicy(BaseModel):
    """The single-point rule."""

    model_config = STRICT
    margin: float = Field(gt=0, lt=1)


class DriftPolicy(BaseModel):
    """C4."""

    model_config = STRICT
    first_iteration: int = Field(ge=1)
    margin: float = Field(gt=0, lt=1)
    calibration_factor: float = Field(gt=0)
    blocks: bool


class ShapePolicy(BaseModel):
    """C5."""

    model_config = STRICT
    block_iterations: int = Field(ge=2)
    confidence: float = Field(gt=0.5, lt=1)
    floor: float = Field(gt=0, lt=1)


class HeldOutPolicy(BaseModel):
    """C6."""

    model_config = STRICT
    margin: float = Field(gt=0, lt=1)
    default_run_sd: float = Field(gt=0, lt=1)


class ThroughputLimits(BaseModel):
    """Limits on the relative change of throughput."""

    model_config = STRICT
    fail: float = Field(gt=-1, lt=0)
    warn: float = Field(gt=-1, lt=0)
    gain: float = Field(gt=0)
    advisory: bool = False
    """Report, never block."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.fail > self.warn:
            raise ValueError(f"fail {self.fail} must not be above warn {self.warn}")
        return self


class ThroughputPolicy(ThroughputLimits):
    """Step time."""

    discard_iterations: int = Field(ge=0)
    discard_fraction: float = Field(ge=0, lt=0.9)
    min_iterations: int = Field(ge=2)
    default_run_sd: float = Field(gt=0, lt=1)
    mde_alpha: float = Field(gt=0, lt=0.5)
    scaling_floor: float = Field(gt=0, le=1)
    by_hardware: dict[str, ThroughputLimits] = {}

    def limits(self, hardware: str | None) -> ThroughputLimits:
        """Limits of a hardware class; the general ones where it has none of its own."""
        return self.by_hardware.get(hardware or "", self)


class MemoryPolicy(BaseModel):
    """Peak memory."""

    model_config = STRICT
    margin: float = Field(gt=0)
    slack_bytes: int = Field(ge=0)


class PlausibilityPolicy(BaseModel):
    """What is physically possible."""

    model_config = STRICT
    mfu_warn: float = Field(gt=0, le=1)
    mfu_invalid: float = Field(gt=0)
    max_time_ratio: float = Field(gt=1)
    max_time_ratio_cpu: float = Field(gt=1)
    rounding: float = Field(gt=0, lt=0.1)


class MachinePolicy(BaseModel):
    """When a machine is at fault."""

    model_config = STRICT
    max_throttled_share: float = Field(ge=0, lt=1)
    sentinel_margin: float = Field(gt=0, lt=1)


class BaselinePolicy(BaseModel):
    """What a baseline needs."""

    model_config = STRICT
    min_runs: int = Field(ge=1)
    max_age_days: int = Field(ge=1)
    ratchet_cap: float = Field(gt=0, lt=1)


class Policy(BaseModel):
    """All margins."""

    model_config = STRICT
    version: int
    alpha: float = Field(gt=0, lt=0.5)
    power: float = Field(gt=0.5, lt=1)
    bootstrap_resamples: int = Field(ge=200)
    bootstrap_seed: int
    sanity: SanityPolicy
    first_forward: FirstForwardPolicy
    first_steps: FirstStepsPolicy
    end_window: EndWindowPolicy
    literal: LiteralPolicy
    drift: DriftPolicy
    shape: ShapePolicy
    held_out: HeldOutPolicy
    throughput: ThroughputPolicy
    memory: MemoryPolicy
    plausibility: PlausibilityPolicy
    machine: MachinePolicy
    baseline: BaselinePolicy

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if self.version != POLICY_VERSION:
            raise ValueError(f"version {self.version}: this harness reads version {POLICY_VERSION}")
        return self


def load_policy(path: Path = POLICY_FILE) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: unreadable TOML, unknown or missing keys, values out of range; all problems in one error.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("policy not found", where=str(path), fix="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("policy is not valid TOML", where=str(path), got=str(error)) from None
    try:
        return Policy.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'policy'}: {item['msg']}" for item in error.errors()
        ]
        raise ConfigError(
            f"{error.error_count()} problem(s) in the policy",
            where=str(path),
            got="; ".join(problems),
            fix="edit the keys named above",
        ) from None


def check_margin(
    name: str, margin: float, minimum_detectable_change: float, *, where: str, otherwise: str = ""
) -> None:
    """Refuse a margin that the noise does not let anybody test; `otherwise` ends how to fix it.

    Raises:
        ConfigError: the margin is below the minimum detectable change.
    """
    if margin < minimum_detectable_change:
        raise ConfigError(
            f"cannot test what is asked: minimum detectable change {minimum_detectable_change:.1%} "
            f"> margin {margin:.1%}",
            where=where,
            expected=f"a margin for {name} of at least {minimum_detectable_change:.2%}",
            got=f"{margin:.2%}",
            fix=f"record more runs for the baseline, or widen the margin in the policy{otherwise}",
        )
