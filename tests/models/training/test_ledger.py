# SPDX-License-Identifier: Apache-2.0
"""Digests of consumed samples."""

from models.training.ledger import Ledger, step_digest


def test_step_digest_ignores_order_inside_a_step_and_sees_a_swap_of_samples() -> None:
    assert step_digest(["a", "b"]) == step_digest(["b", "a"])
    assert step_digest(["a", "b"]) != step_digest(["a", "c"])
    assert step_digest(["a", "a"]) != step_digest(["a"])
    assert step_digest(["ab", "c"]) != step_digest(["a", "bc"])


def test_ledger_sees_the_order_of_steps_and_goes_on_from_its_steps() -> None:
    whole, other = Ledger(), Ledger()
    for keys in (["a"], ["b"]):
        whole.add(keys)
    for keys in (["b"], ["a"]):
        other.add(keys)
    assert whole.digest() != other.digest()
    assert Ledger(whole.steps).digest() == whole.digest()
