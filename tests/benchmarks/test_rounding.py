# SPDX-License-Identifier: Apache-2.0
import torch

from benchmarks.rounding import nudge


def test_nudge_moves_every_weight_by_one_float_up_or_down() -> None:
    weight = torch.randn(64, 32)
    moved = nudge("layers.0.weight", weight, 1)
    up, down = (
        torch.nextafter(weight, torch.tensor(torch.inf)),
        torch.nextafter(weight, torch.tensor(-torch.inf)),
    )
    assert ((moved == up) | (moved == down)).all()
    assert 0.4 < (moved == up).float().mean() < 0.6
    assert torch.equal(nudge("layers.0.weight", weight, 1), moved)
    assert not torch.equal(nudge("layers.0.weight", weight, 2), moved)
    whole = torch.arange(3)
    assert torch.equal(nudge("index", whole, 1), whole)
