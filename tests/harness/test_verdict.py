# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math

import pytest

from harness.verdict import EXIT_CODES, GateResult, GateStatus, Verdict, VerdictName, verdict_of_gates, worst
from models.contract.errors import ConfigError


def gate(status: GateStatus, *, blocks: bool = True) -> GateResult:
    return GateResult(gate="C3", status=status, blocks=blocks, summary="text")


def test_exit_codes_leave_pytest_its_own() -> None:
    assert EXIT_CODES == {
        "PASS": 0, "PASS_IMPROVED": 0, "REGRESSION": 10, "INVALID": 11, "INCONCLUSIVE": 12, "NO_BASELINE": 13,
        "ENV_MISMATCH": 14, "INFRA_ERROR": 15,
    }  # fmt: skip


def test_worst_wins_in_the_stated_order() -> None:
    order: list[VerdictName] = [
        "INVALID", "REGRESSION", "ENV_MISMATCH", "INFRA_ERROR", "NO_BASELINE", "INCONCLUSIVE", "PASS_IMPROVED", "PASS",
    ]  # fmt: skip
    for first, second in itertools.combinations(order, 2):
        assert worst([second, first]) == first
    assert set(order) == set(EXIT_CODES)


def test_nothing_graded_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no verdict"):
        worst([])


@pytest.mark.parametrize(
    ("gates", "name"),
    [
        pytest.param([gate("pass"), gate("warn")], "PASS", id="warn_passes"),
        pytest.param([gate("pass"), gate("fail"), gate("invalid")], "INVALID", id="invalid_beats_fail"),
        pytest.param([gate("inconclusive"), gate("fail")], "REGRESSION", id="fail_beats_inconclusive"),
        pytest.param([gate("pass"), gate("inconclusive")], "INCONCLUSIVE", id="inconclusive"),
        pytest.param([gate("pass"), gate("fail", blocks=False)], "PASS", id="advisory_fail"),
        pytest.param([gate("pass"), gate("invalid", blocks=False)], "PASS", id="advisory_invalid"),
        pytest.param([gate("not_run")], "INCONCLUSIVE", id="nothing_ran"),
        pytest.param([gate("pass", blocks=False)], "INCONCLUSIVE", id="nothing_blocking_ran"),
        pytest.param([], "INCONCLUSIVE", id="empty"),
    ],
)
def test_gates_combine(gates: list[GateResult], name: str) -> None:
    assert verdict_of_gates(gates) == name


def test_improvement_only_shows_on_a_pass() -> None:
    assert verdict_of_gates([gate("pass")], improved=True) == "PASS_IMPROVED"
    assert verdict_of_gates([gate("pass"), gate("fail")], improved=True) == "REGRESSION"


def test_verdict_survives_json() -> None:
    result = GateResult(
        gate="C3", status="fail", blocks=True, summary="s", effect=0.08, interval=(0.07, math.inf),
        margin=(-0.05, 0.05), minimum_detectable_change=0.01, details={"window": [451, 500]},
    )  # fmt: skip
    verdict = Verdict(
        name="REGRESSION", gates=(result, gate("pass")), baseline_id="ab", match_level="exact", notes=("n",)
    )
    text = json.dumps(verdict.to_dict(), allow_nan=False)
    assert Verdict.from_dict(json.loads(text)) == verdict
    assert json.loads(text)["exit_code"] == verdict.exit_code == 10
    assert verdict.gate("C3") is result
    assert verdict.gate("C9") is None


@pytest.mark.parametrize(
    "change",
    [{"name": "FINE"}, {"surprise": 1}, {"gates": [{"gate": "C0"}]}],
    ids=["unknown_name", "unknown_key", "gate_without_keys"],
)
def test_foreign_verdict_is_refused(change: dict[str, object]) -> None:
    data = Verdict(name="PASS", gates=(gate("pass"),)).to_dict() | change
    with pytest.raises(ConfigError, match="of this version"):
        Verdict.from_dict(data)


def test_unknown_gate_status_is_refused() -> None:
    data = gate("pass").to_dict() | {"status": "green"}
    with pytest.raises(ConfigError, match="status"):
        GateResult.from_dict(data)
