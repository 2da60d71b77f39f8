# SPDX-License-Identifier: Apache-2.0
"""Verdicts, their precedence and their exit codes.

    PASS, PASS_IMPROVED  0    equivalent, or better beyond the margin
    REGRESSION          10    outside the margin, with confidence
    INVALID             11    the record cannot be judged: not finite, steps missing, physically impossible
    INCONCLUSIVE        12    the interval straddles the margin
    NO_BASELINE         13    nothing to compare with
    ENV_MISMATCH        14    the record is from another kind of machine than was asked for
    INFRA_ERROR         15    the run died before it trained

The worst wins, in the order 11 > 10 > 14 > 15 > 13 > 12 > 0. Codes 0 to 6 keep pytest's meaning.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from models.contract.errors import ConfigError
from models.contract.record import to_json_number

GateStatus = Literal["pass", "warn", "fail", "invalid", "inconclusive", "not_run"]
VerdictName = Literal[
    "PASS",
    "PASS_IMPROVED",
    "REGRESSION",
    "INVALID",
    "INCONCLUSIVE",
    "NO_BASELINE",
    "ENV_MISMATCH",
    "INFRA_ERROR",
]

EXIT_CODES: dict[VerdictName, int] = {
    "PASS": 0,
    "PASS_IMPROVED": 0,
    "REGRESSION": 10,
    "INVALID": 11,
    "INCONCLUSIVE": 12,
    "NO_BASELINE": 13,
    "ENV_MISMATCH": 14,
    "INFRA_ERROR": 15,
}

WORST_FIRST: tuple[VerdictName, ...] = (
    "INVALID",
    "REGRESSION",
    "ENV_MISMATCH",
    "INFRA_ERROR",
    "NO_BASELINE",
    "INCONCLUSIVE",
    "PASS_IMPROVED",
    "PASS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What one gate found.

    `effect`, `interval`, `margin` and `minimum_detectable_change` are relative changes (0.05 means 5%) unless
    `details["unit"]` says otherwise.
    """

    gate: str
    """C0 … C6, literal, throughput, memory, plausibility, environment, machine."""
    status: GateStatus
    blocks: bool
    """Whether a status other than pass and warn decides the verdict."""
    summary: str
    """One line for a person: effect, interval, margin, first offending iteration."""
    effect: float | None = None
    interval: tuple[float, float] | None = None
    margin: tuple[float, float] | None = None
    minimum_detectable_change: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-safe data; non-finite numbers become strings."""
        return to_json_number({item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read back what :meth:`to_dict` wrote. Raises ConfigError naming unknown or missing keys."""
        _check_keys(data, cls)
        if data["status"] not in get_args(GateStatus):
            raise ConfigError("unknown gate status", where=str(data["gate"]), got=repr(data["status"]))
        values = {**data, "interval": _pair(data["interval"]), "margin": _pair(data["margin"])}
        for key in ("effect", "minimum_detectable_change"):
            values[key] = _number(data[key])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer for one run."""

    name: VerdictName
    gates: tuple[GateResult, ...] = ()
    baseline_id: str | None = None
    match_level: str = "none"
    """exact, stack_drift, other_hardware, published or none."""
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Exit code of a process whose only business was this verdict."""
        return EXIT_CODES[self.name]

    def gate(self, name: str) -> GateResult | None:
        """The result of one gate, or None if it was not part of this grading."""
        return next((gate for gate in self.gates if gate.gate == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-safe data (``verdict.json``)."""
        return {
            "name": self.name,
            "exit_code": self.exit_code,
            "baseline_id": self.baseline_id,
            "match_level": self.match_level,
            "notes": list(self.notes),
            "gates": [gate.to_dict() for gate in self.gates],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read back what :meth:`to_dict` wrote. Raises ConfigError for a foreign or newer file."""
        known = {item.name for item in fields(cls)} | {"exit_code"}
        if (
            set(data) != known
            or not isinstance(data["name"], str)
            or data["name"] not in EXIT_CODES
            or not isinstance(data["gates"], list)
            or not isinstance(data["notes"], list)
        ):
            raise ConfigError(
                "not a verdict of this version",
                expected=f"keys {', '.join(sorted(known))}",
                got=f"name {data.get('name')!r}, keys {', '.join(sorted(data))}",
                fix="grade the run again",
            )
        return cls(
            name=data["name"],
            gates=tuple(GateResult.from_dict(gate) for gate in data["gates"]),
            baseline_id=data["baseline_id"],
            match_level=data["match_level"],
            notes=tuple(data["notes"]),
        )


def worst(names: Iterable[VerdictName]) -> VerdictName:
    """The verdict that decides among several.

    Raises:
        ConfigError: there is none: nothing was graded, and nothing may not pass.
    """
    found = set(names)
    if not found:
        raise ConfigError("no verdict to choose from", fix="grade at least one run")
    return next(name for name in WORST_FIRST if name in found)


def verdict_of_gates(gates: Iterable[GateResult], *, improved: bool = False) -> VerdictName:
    """Combine gate results: any blocking `invalid`, then `fail`, then `inconclusive`; else PASS.

    Args:
        gates: All gates of one grading.
        improved: A metric with a direction is better beyond its margin.
    """
    statuses = {gate.status for gate in gates if gate.blocks}
    if "invalid" in statuses:
        return "INVALID"
    if "fail" in statuses:
        return "REGRESSION"
    if "inconclusive" in statuses or not statuses - {"not_run"}:
        return "INCONCLUSIVE"
    return "PASS_IMPROVED" if improved else "PASS"


def _check_keys(data: Any, cls: type[GateResult]) -> None:
    known = {item.name for item in fields(cls)}
    if not isinstance(data, dict) or set(data) != known:
        raise ConfigError(
            "not a gate result of this version",
            expected=f"keys {', '.join(sorted(known))}",
            got=f"keys {', '.join(sorted(data))}" if isinstance(data, dict) else repr(data)[:80],
            fix="grade the run again",
        )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))
