# SPDX-License-Identifier: Apache-2.0
"""The conversion benchmark: rates are compared within a round, and a peer that does not run says why."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.conversion import Run, measure, summarize, time_peer
from models.conversion.tiny import write_tiny_checkpoint


def test_rates_are_compared_with_the_copy_of_their_own_round() -> None:
    copies = [Run(4.0, 3.0), Run(9.0, 3.0), Run(5.0, 3.0)]
    row = summarize([Run(5.0, 6.0, 10), Run(10.0, 8.0, 30), Run(5.0, 7.0, 20)], copies)
    assert row["ratios_to_cp"] == [0.8, 0.9, 1.0]
    assert row["median_ratio_to_cp"] == 0.9
    assert (row["best_s"], row["median_s"], row["worst_s"]) == (5.0, 5.0, 10.0)
    assert (row["peak_bytes"], row["cpu_s"]) == (30, 7.0)


def test_peer_that_does_not_run_says_why(tmp_path: Path) -> None:
    reason = time_peer(Path(sys.executable), tmp_path, tmp_path / "out")
    assert reason == "ModuleNotFoundError: No module named 'megatron.bridge'"


@pytest.mark.slow
def test_every_round_measures_all_three(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", "qwen3_vl", init="coded", dtype=torch.bfloat16)
    runs, same = measure(tmp_path, source, 2, 2)
    assert same
    assert {name: len(some) for name, some in runs.items()} == {
        "cp": 2,
        "hf_to_megatron": 2,
        "megatron_to_hf": 2,
    }
    assert all(run.seconds > 0 and run.cpu_s >= 0 for some in runs.values() for run in some)
    assert all(run.peak_bytes > 0 for name, some in runs.items() if name != "cp" for run in some)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
