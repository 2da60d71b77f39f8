# SPDX-License-Identifier: Apache-2.0
"""How long judging takes, as a user waits for it: every figure is the median of fresh processes.

    python -m benchmarks.judge [--repeats 5]

Exit code 1 when a limit is missed. The runs and baselines are made up: 500 iterations each, three launches a baseline.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness.baselines import BaselineKey, baseline_of_records
from harness.baselines.store import baseline_path, write_baseline
from harness.policy import load_policy
from harness.records import load_record
from harness.session import SessionOptions, grade_record, write_grading
from suites.detection.synthetic import SyntheticRun, recipe_of, write_synthetic_run

LIMITS_S = {
    "grade of a 500-iteration run against a baseline, cold": 2.0,
    "report of 50 cases": 10.0,
    "import harness": 0.5,
    "import of the command line and the plugin": 0.5,
    "plugin, on an empty collection": 0.2,
}
NUM_CASES = 50
ENTRY_POINTS = "import sys, harness.cli.app, harness.plugin; assert 'torch' not in sys.modules"
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""So that other plugins' start-up is not in the difference."""


def main() -> int:
    """Measure, print, compare with the limits."""
    parser = argparse.ArgumentParser(prog="benchmarks.judge", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes a figure")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        found = dict(zip(LIMITS_S, _measure(Path(name), repeats), strict=True))
    for what, limit in LIMITS_S.items():
        word = "ok" if found[what] < limit else "MISSED"
        print(f"{what:<56} {found[what]:7.3f} s   limit {limit:g} s   {word}")
    return int(any(found[what] >= limit for what, limit in LIMITS_S.items()))


def _measure(folder: Path, repeats: int) -> list[float]:
    """The figures in the order of the limits."""
    runs, baselines = _graded_runs(folder)
    empty = folder / "empty"
    empty.mkdir()
    pytest = [sys.executable, "-m", "pytest", str(empty), "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    start = _median(lambda: _run([sys.executable, "-c", "pass"]), repeats)
    without = _median(lambda: _run(pytest, ok=(5,), **ALONE), 2 * repeats)
    program = [sys.executable, "-c", "from harness.cli import main; main()"]
    grade = [*program, "grade", str(runs / "0"), "--baseline-dir", str(baselines), "--no-write"]
    report = [*program, "report", str(runs), "--output", str(folder / "report")]
    return [
        _median(lambda: _run(grade), repeats),
        _median(lambda: _run(report), max(1, repeats // 2)),
        _median(lambda: _run([sys.executable, "-c", "import harness"]), repeats) - start,
        _median(lambda: _run([sys.executable, "-c", ENTRY_POINTS]), repeats) - start,
        _median(lambda: _run([*pytest, "-p", "harness.plugin"], ok=(5,), **ALONE), 2 * repeats) - without,
    ]


def _graded_runs(folder: Path) -> tuple[Path, Path]:
    """Fifty graded runs, and the folder with the baseline they were compared with."""
    policy, baselines, runs = load_policy(), folder / "baselines", folder / "runs"
    launches = [SyntheticRun(run_seed=1000 + number) for number in range(3)]
    records = [load_record(write_synthetic_run(folder / f"launch-{run.run_seed}", run)) for run in launches]
    key = BaselineKey(suite="benchmark", case="case", recipe_sha=recipe_of(launches[0]).sha(), hardware="cpu")
    baseline = baseline_of_records(records, key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00")
    write_baseline(baseline, baseline_path(baselines, key))
    options = SessionOptions(run_root=runs, baseline_dir=baselines)
    for number in range(NUM_CASES):
        run = write_synthetic_run(runs / str(number), SyntheticRun(run_seed=number + 1))
        write_grading(
            run, grade_record(load_record(run), options, hardware="cpu"), case=None, gate_mode="tost"
        )
        verdict = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
        assert verdict["baseline_id"] == baseline.baseline_id
    return runs, baselines


def _median(action: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _run(command: list[str], *, ok: tuple[int, ...] = (0,), **variables: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    if done.returncode not in ok:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
