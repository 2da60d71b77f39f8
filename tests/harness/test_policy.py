# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from harness.policy import POLICY_FILE, check_margin, load_policy
from models.contract.errors import ConfigError


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = POLICY_FILE.read_text()
    assert old in text
    path = tmp_path / "policy.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_shipped_policy_has_the_stated_margins() -> None:
    policy = load_policy()
    assert policy.first_forward.margin_same_hardware == 0.002
    assert policy.first_forward.margin_other_hardware == 0.005
    assert (policy.first_steps.mean_abs_margin, policy.first_steps.mean_margin) == (0.005, 0.003)
    assert (policy.end_window.margin, policy.end_window.num_iterations) == (0.05, 50)
    assert (policy.literal.margin, policy.held_out.margin, policy.drift.margin) == (0.05, 0.02, 0.005)
    assert (policy.throughput.fail, policy.throughput.warn, policy.throughput.gain) == (-0.05, -0.03, 0.05)
    assert policy.throughput.scaling_floor == 0.97


def test_limits_of_a_hardware_class() -> None:
    throughput = load_policy().throughput
    assert throughput.limits("cpu").advisory
    assert throughput.limits("h100") is throughput
    assert throughput.limits(None).fail == -0.05


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        pytest.param("margin = 0.05 ", "margn = 0.05 ", "policy|margn|extra", id="unknown_key"),
        pytest.param("alpha = 0.05", "alpha = 0.7", "alpha", id="out_of_range"),
        pytest.param("alpha = 0.05", "alpha = nan", "alpha", id="nan"),
        pytest.param("alpha = 0.05", 'alpha = "0.05"', "alpha", id="text"),
        pytest.param("version = 1", "version = 2", "version 2", id="newer"),
        pytest.param("fail = -0.05", "fail = -0.01", "must not be above", id="fail_above_warn"),
        pytest.param("[literal]\nmargin = 0.05", "", "literal", id="section_missing"),
        pytest.param("[literal]", "[literal", "not valid TOML", id="torn"),
    ],
)
def test_wrong_policy_is_refused(old: str, new: str, text: str, tmp_path: Path) -> None:
    old = old if old in POLICY_FILE.read_text() else old.strip()
    with pytest.raises(ConfigError, match=text):
        load_policy(changed(tmp_path, old, new.strip() if old == old.strip() else new))


def test_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy not found"):
        load_policy(tmp_path / "none.toml")


def test_margin_below_the_detectable_change_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"minimum detectable change 3.8% > margin 3.0%"):
        check_margin("throughput", 0.03, 0.038, where="case")
    check_margin("throughput", 0.038, 0.038, where="case")
