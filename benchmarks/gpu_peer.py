# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one micro-batch, ours beside two peers: same sizes, same micro-batch, one GPU, bf16.

    python -m benchmarks.gpu_peer qwen2_5_vl_7b:20x448 qwen3_vl_8b:20x512:samples=4 qwen3_vl_30b_a3b:8x448:layers=12
    python -m benchmarks.gpu_peer --sides mcore_bridge,ours qwen3_vl_8b:1x512

Each argument is a published size and how many images of which side stand in its 8,192 tokens; `layers` keeps the first
decoder layers of it on every side, `samples` packs the row of so many equal samples. The peers are transformers with
SDPA and mcore-bridge, where it can be imported; `benchmarks/peer_models.py` says how each is set up. Every side has a
process of its own, since mcore-bridge patches the other two's libraries, and one that fails must cost no other its
figures. Prints one JSON line a case: of each side ms, peak GiB and loss, or why there are none, and how many times
faster ours is than each peer. Losses must lie where random weights put them, a little above the logarithm of the
vocabulary, 11.9.
"""

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.peer_case import PeerCase, parse_case
from models.contract.errors import HarnessError

SIDES = ("transformers", "mcore_bridge", "ours")
PEERS = SIDES[:-1]
SIDE_TIMEOUT_S = 240.0
"""A side takes under a minute, most of it imports, kernels that are compiled and weights that are drawn."""

Run = Callable[[str, PeerCase], dict[str, Any]]


def run_side(side: str, case: PeerCase) -> dict[str, Any]:
    """Time a side on the GPU of this process; see :func:`benchmarks.peer_models.time_side`."""
    from benchmarks.peer_models import time_side

    return time_side(side, case)


def serve(side: str, run: Run, connection: Any) -> None:
    """Answer cases until one fails; with this process goes all that the failed one held."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the parent's lines stay alone on stdout
    while True:
        case = connection.recv()
        try:
            result = run(side, case)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its column says
            traceback.print_exc()
            connection.send({"error": f"{type(error).__name__}: {error}"[:300]})
            return
        connection.send(result)


class SideProcess:
    """One side in a process that lives from case to case, so that imports are paid once, and anew after a failure."""

    def __init__(self, side: str, run: Run = run_side, *, timeout_s: float = SIDE_TIMEOUT_S) -> None:
        self.side, self._run, self._timeout_s = side, run, timeout_s
        self._process: Any = None
        self._connection: Any = None

    def time(self, case: PeerCase) -> dict[str, Any]:
        """What the side answers, or `error` alone: what it raised, that it ended, or that it took too long."""
        if self._process is None:
            self._process, self._connection = self._start()
        process, connection = self._process, self._connection
        try:
            connection.send(case)
            in_time = connection.poll(self._timeout_s)
            result = connection.recv() if in_time else {"error": f"no answer in {self._timeout_s:.0f} s"}
        except (EOFError, OSError):
            process.join(5)
            result = {"error": f"its process ended with exit code {process.exitcode}"}
        if "error" in result:
            self.stop()
        return result

    def stop(self) -> None:
        """End the process; its memory on the device is free afterwards."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(self.side, self._run, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def make_row(case: PeerCase, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the table, from what each side answered."""
    row = case.describe()
    for side, result in results.items():
        row |= {"device": result["device"]} if "device" in result else {}
        row[f"{side}_ms"] = result.get("error", result.get("ms"))
        row |= {f"{side}_{key}": result[key] for key in ("gib", "loss") if key in result}
    ours = results.get("ours", {}).get("ms")
    for peer in PEERS:
        theirs = results.get(peer, {}).get("ms")
        if ours is not None and theirs is not None:
            row[f"times_faster_than_{peer}"] = round(theirs / ours, 3)
    if case.num_samples > 1 and "transformers" in results:
        row["transformers_rows"] = f"{case.num_samples} samples as a batch, not packed"
    return row


def run_case(case: PeerCase, sides: Sequence[SideProcess]) -> dict[str, Any]:
    """Time every side, one after the other; each result is told on stderr as soon as it is there."""
    results = {}
    for side in sides:
        results[side.side] = side.time(case)
        print(f"{case}: {side.side}: {results[side.side]}", file=sys.stderr, flush=True)
    return make_row(case, results)


def parse_arguments(arguments: Sequence[str]) -> tuple[list[PeerCase], list[str]]:
    """Cases and sides of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="+", metavar="SIZE:IMAGESxSIDE[:layers=N][:samples=N]")
    parser.add_argument("--sides", default=",".join(SIDES), help="which sides, and in which order")
    options = parser.parse_args(arguments)
    sides = options.sides.split(",")
    unknown = sorted(set(sides) - set(SIDES))
    if unknown:
        parser.error(f"--sides: {', '.join(unknown)} is none of {', '.join(SIDES)}")
    cases = [parse_case(argument) for argument in options.cases]
    for case in cases:
        case.hf_config()  # a size that does not exist, or a cut that cannot be, is told before minutes are spent
    return cases, sides


def has_gpu() -> bool:
    """Whether the sides will find a device."""
    import torch

    return torch.cuda.is_available()


def main() -> None:
    """Run every case."""
    try:
        cases, names = parse_arguments(sys.argv[1:])
    except HarnessError as error:
        sys.exit(str(error))
    if not has_gpu():
        sys.exit("peers are timed on a CUDA device, and this machine shows none")
    sides = [SideProcess(name) for name in names]
    try:
        for case in cases:
            print(json.dumps(run_case(case, sides)), flush=True)
    finally:
        for side in sides:
            side.stop()


if __name__ == "__main__":
    main()
