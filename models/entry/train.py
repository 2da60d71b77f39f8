# SPDX-License-Identifier: Apache-2.0
"""Train one recipe: ``python -m torch.distributed.run … -m models.entry.train --recipe FILE --run-dir DIR``.

Exit codes: 0 completed or interrupted in good order (``run.json`` says which), 1 failed (it says why), 75 a step hung.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from models.contract.driver import set_driver_defaults
from models.contract.errors import HarnessError
from models.contract.launcher import read_launcher_environment
from models.contract.recipe import load_recipe
from models.contract.site import load_site

MAX_SECONDS = 1e7
"""More than a quarter of a year, and less than what a C library's clock holds."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; it selects and limits, and never changes a recipe value."""
    parser = argparse.ArgumentParser(prog="models.entry.train", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="recipe (TOML)")
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="new folder for everything this run writes"
    )
    parser.add_argument("--site", type=Path, help="site file; default: $QWEN_HARNESS_SITE, then site.toml")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run directory's last checkpoint"
    )
    parser.add_argument(
        "--stop-after", type=_iteration, metavar="ITERATION", help="leave early, as if interrupted"
    )
    parser.add_argument(
        "--step-timeout", type=_seconds, default=1800.0, metavar="SECONDS", help="a longer step is a hang"
    )
    parser.add_argument(
        "--peer-timeout", type=_seconds, default=600.0, metavar="SECONDS",
        help="how long the ranks wait for each other at the start",
    )  # fmt: skip
    parser.add_argument(
        "--trace", type=_iteration, metavar="ITERATION", help="record this iteration's tensors, for `diverge`"
    )
    parser.add_argument(
        "--profile", type=_iteration, metavar="ITERATION",
        help="write where this iteration's time goes, kernel by kernel, to profile_ITERATION.md; it takes longer",
    )  # fmt: skip
    parser.add_argument(
        "--no-memory-check", action="store_true", help="try even what does not fit the device by the plan"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files")
    return parser.parse_args(arguments)


def _iteration(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"iterations count from 1: {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0: {text}")
    return value


def main() -> int:
    """Run; errors that a person can act on end in their own text, without a traceback."""
    arguments = parse_arguments()
    set_driver_defaults()
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING,
        format="%(message)s" if rank == "0" else f"[rank {rank}] %(message)s",
        stream=sys.stdout,
    )
    for noisy in ("megatron", "torch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        read_launcher_environment()  # a wrong variable is told before the imports that take seconds
        recipe = load_recipe(arguments.recipe)
        site = load_site(arguments.site)
        from models.training.progress import TrainOptions
        from models.training.start import train

        options = TrainOptions(
            is_resume=arguments.resume,
            stop_after=arguments.stop_after,
            step_timeout_s=arguments.step_timeout,
            peer_timeout_s=arguments.peer_timeout,
            checks_memory=not arguments.no_memory_check,
            tensorboard=arguments.tensorboard,
            trace=arguments.trace,
            profile=arguments.profile,
        )
        train(recipe, site, arguments.run_dir, options)
        return 0
    except HarnessError as error:
        notes = getattr(error, "__notes__", [])
        sys.stderr.write("\n".join([f"[rank {rank}] {error}", *notes]) + "\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
