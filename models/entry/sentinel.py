# SPDX-License-Identifier: Apache-2.0
"""Measure what this machine can do, beside a run: a matrix product on every device, an all-reduce over all of them.

    torchrun --nproc-per-node 8 -m models.entry.sentinel --output RUN/sentinel-before.json --seconds 10

The harness starts it before and after a run, with the run's launcher and number of processes.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from models.contract.errors import HarnessError
from models.contract.launcher import read_launcher_environment
from models.contract.sentinel import Sentinel


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="models.entry.sentinel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="file that rank 0 writes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of the two measurements")
    return parser.parse_args(arguments)


def measure(seconds: float) -> Sentinel | None:
    """Measure on all ranks; rank 0 gets what they found."""
    from torch import distributed

    from models.training import device_rates
    from models.training.processes import join_processes

    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    launcher = read_launcher_environment()
    device = join_processes(launcher, timeout_s=120.0)
    try:
        is_alone = launcher.world_size == 1
        # All at once, as in a step: devices of one host share its power and its air.
        mine = (device_rates.device_name(device), device_rates.matmul_rate(device, seconds=seconds))
        bandwidth = None if is_alone else device_rates.all_reduce_gb_per_s(device, seconds=seconds)
        found = [mine] * launcher.world_size
        distributed.all_gather_object(found, mine)
    finally:
        distributed.destroy_process_group()
    if launcher.rank:
        return None
    return Sentinel(
        started_at=started_at,
        device_names=tuple(name for name, _ in found),
        dtype=str(device_rates.rate_dtype(device)).removeprefix("torch."),
        matmul_size=device_rates.MATMUL_SIZE[device.type],
        matmul_tflops=tuple(rate.median_tflops for _, rate in found),
        matmul_best_tflops=tuple(rate.best_tflops for _, rate in found),
        all_reduce_bytes=0 if is_alone else device_rates.REDUCE_BYTES[device.type],
        all_reduce_gb_per_s=bandwidth,
    )


def main() -> int:
    """Run; rank 0 writes the file and prints the rates."""
    arguments = parse_arguments()
    try:
        found = measure(arguments.seconds)
    except HarnessError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if found is not None:
        found.write(arguments.output)
        rates = " ".join(f"{rate:.1f}" for rate in found.matmul_tflops)
        bandwidth = found.all_reduce_gb_per_s
        reduced = "" if bandwidth is None else f", all-reduce {bandwidth:.1f} GB/s"
        sys.stdout.write(f"matrix product {rates} TFLOP/s{reduced}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
