# SPDX-License-Identifier: Apache-2.0
"""Trains a list of jobs one after the other, each in a forked child with at most one planted fault.

    python -m suites.detection.train_with_fault JOBS.json

Each job is {"fault": name or null, "recipe": file, "run_dir": folder, "site": file, "num_threads": n}. What is heavy to
import is imported once, before the first fork.
"""

import json
import logging
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from models.contract.recipe import load_recipe
from models.contract.site import load_site
from models.training.progress import TrainOptions
from models.training.start import train
from suites.detection.patches import PATCHES
from suites.detection.training_jobs import ERROR_FILE


def run_job(job: dict[str, Any]) -> None:
    """Plant the fault and train, in this process."""
    torch.set_num_threads(job["num_threads"])
    if job["fault"] is not None:
        PATCHES[job["fault"]]()
    options = TrainOptions(is_resume=False, stop_after=None, step_timeout_s=600.0, tensorboard=False)
    train(load_recipe(Path(job["recipe"])), load_site(Path(job["site"])), Path(job["run_dir"]), options)


def _stop_workers() -> None:
    """End what writes checkpoints in the background: `os._exit` would leave it behind, holding our pipes."""
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()


def main() -> int:
    """Run all jobs; a job that fails has said so in its run directory, and the next one follows."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_job(job)
                status = 0
            except Exception:  # noqa: BLE001 - a planted fault may fail in any way; the run directory has it too
                Path(job["run_dir"]).mkdir(parents=True, exist_ok=True)
                (Path(job["run_dir"]) / ERROR_FILE).write_text(traceback.format_exc(), encoding="utf-8")
            finally:
                _stop_workers()
                os._exit(status)
        os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
