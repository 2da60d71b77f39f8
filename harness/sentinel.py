# SPDX-License-Identifier: Apache-2.0
"""Measures the machine before and after a run, with the run's own launcher: is the node slow, or the code?"""

import contextlib
import logging
import subprocess
from pathlib import Path

from harness.cases import Case
from harness.launch import child_environment, start_group, stop_group, torchrun_command
from models.contract.cluster import ONE_NODE, Cluster
from models.contract.sentinel import SENTINEL_PREFIX, When, sentinel_file

logger = logging.getLogger(__name__)

DEFAULT_SECONDS = 10.0
"""Of each measurement on accelerators; a CPU, where starting alone takes as long, is measured only when asked."""
STARTING_S = 300.0
"""What starting the processes, and their meeting on several nodes, may take."""


def sentinel_seconds(case: Case, asked: float | None) -> float:
    """How long to measure; 0 is not at all."""
    if asked is not None:
        return asked
    return 0.0 if case.hardware == "cpu" else DEFAULT_SECONDS


def measure_machine(
    case: Case, run_dir: Path, when: When, *, seconds: float, cluster: Cluster = ONE_NODE
) -> None:
    """Run the sentinel on the case's devices and leave its file in the run directory.

    A measurement that fails leaves a warning and no file: training, next, says more about what is wrong.
    """
    if not seconds:
        return
    logger.info("%s: measuring the machine %s the run, about %.0f s", case.id, when, 10 + 2 * seconds)
    run_dir.mkdir(parents=True, exist_ok=True)
    file = sentinel_file(run_dir, when)
    program = ["models.entry.sentinel", "--output", str(file), "--seconds", str(seconds)]
    command = torchrun_command(program, case.recipe.num_processes, cluster)
    environment = child_environment(case.hardware, 1 if case.hardware == "cpu" else None)
    log_file = run_dir / f"{SENTINEL_PREFIX}{when}-node-{cluster.node_rank}.log"
    with log_file.open("wb") as log:
        process = start_group(command, environment, log)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STARTING_S + 3 * seconds)
        finally:
            stop_group(process)
    if process.returncode:
        logger.warning("the machine could not be measured %s the run: %s", when, log_file)
    else:
        log_file.unlink()
