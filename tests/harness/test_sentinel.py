# SPDX-License-Identifier: Apache-2.0
"""The machine is measured around a run, and a measurement that fails costs the run nothing."""

import sys
from pathlib import Path

import pytest

from harness import sentinel
from harness.cases import Case
from harness.records.machine import read_machine
from harness.sentinel import DEFAULT_SECONDS, measure_machine, sentinel_seconds
from models.contract.sentinel import sentinel_file
from suites.detection.synthetic import SyntheticRun, recipe_of


def case_of(hardware: str, num_processes: int = 1) -> Case:
    recipe = recipe_of(SyntheticRun()).model_copy(update={"num_processes": num_processes})
    return Case(suite="throughput", hardware=hardware, recipe=recipe, recipe_file=Path("r.toml"))


@pytest.mark.parametrize(
    ("hardware", "asked", "expected"),
    [("cpu", None, 0.0), ("h200", None, DEFAULT_SECONDS), ("npu_a3", None, DEFAULT_SECONDS), ("cpu", 2.0, 2.0),
     ("h200", 0.0, 0.0)],
)  # fmt: skip
def test_accelerators_are_measured_unless_asked_otherwise(
    hardware: str, asked: float | None, expected: float
) -> None:
    assert sentinel_seconds(case_of(hardware), asked) == expected


def test_no_time_is_no_measurement(tmp_path: Path) -> None:
    measure_machine(case_of("cpu"), tmp_path / "run", "before", seconds=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_program_measures_every_device(num_processes: int, tmp_path: Path) -> None:
    for when in ("before", "after"):
        measure_machine(case_of("cpu", num_processes), tmp_path, when, seconds=0.2)
    facts = read_machine(tmp_path)
    assert [len(found.matmul_tflops) for found in facts.sentinels.values()] == [num_processes] * 2
    assert (facts.matmul_tflops or 0) > 1e-4
    assert (facts.all_reduce_gb_per_s is None) == (num_processes == 1)
    assert {item.name for item in tmp_path.iterdir()} == {"sentinel-before.json", "sentinel-after.json"}


@pytest.mark.parametrize(
    ("program", "limit_s"),
    [("raise SystemExit('no devices here')", 300.0), ("import time; time.sleep(60)", 0.5)],
)
def test_a_measurement_that_fails_leaves_its_words_and_no_file(
    program: str,
    limit_s: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sentinel, "torchrun_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(sentinel, "STARTING_S", limit_s)
    measure_machine(case_of("cpu"), tmp_path, "before", seconds=0.1)
    assert not sentinel_file(tmp_path, "before").exists()
    [log] = tmp_path.iterdir()
    assert f"could not be measured before the run: {log}" in caplog.text
    assert ("no devices here" in log.read_text()) == program.startswith("raise")
