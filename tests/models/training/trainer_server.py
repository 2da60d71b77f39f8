# SPDX-License-Identifier: Apache-2.0
"""Starts training processes quickly: what is heavy to import is imported once, every rank is a fork.

    python trainer_server.py CHECKPOINT

A line of standard input is a job, {"arguments": [...], "num_processes": n, "port": p, "fault": name or null}: the
arguments are those of ``models.entry.train``. The answer is a line with the process ids, and, when all of them have
ended, a line with how each ended (exit code, or minus the signal).
"""

import json
import os
import sys
import threading
from pathlib import Path

# What is heavy is imported in the functions: megatron-core's checkpoint writers import this file once more.


def hang_at_the_second_update(rank: int) -> None:
    """Rank 1 never comes back from its second optimizer step."""
    from models.training import loop

    update, calls = loop.guarded_update, []

    def stuck_update(*arguments: object) -> object:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            threading.Event().wait()
        return update(*arguments)

    loop.guarded_update = stuck_update


def fail_at_the_second_update(rank: int) -> None:
    """Rank 1 raises in its second optimizer step; the others are in a collective then."""
    from models.training import loop

    update, calls = loop.guarded_update, []

    def failing_update(*arguments: object) -> object:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise ValueError("planted on rank 1")
        return update(*arguments)

    loop.guarded_update = failing_update


def cut_small_buckets(rank: int) -> None:
    """No fault: data parallelism exchanges in many parts, as it does with models that are not tiny."""
    from models.training import optimizer

    config = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = lambda **fields: config(**fields, bucket_size=20_000)


FAULTS = {
    "hang": hang_at_the_second_update, "fail": fail_at_the_second_update, "small-buckets": cut_small_buckets,
}  # fmt: skip


def be_rank(job: dict, rank: int) -> int:
    """Train as one rank; returns the exit code."""
    run_dir = Path(job["arguments"][job["arguments"].index("--run-dir") + 1])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(run_dir.with_suffix(f".rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["num_processes"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["num_processes"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]),
        }  # fmt: skip
    if job["fault"]:
        FAULTS[job["fault"]](rank)
    sys.argv = ["train", *job["arguments"]]
    from models.entry import train

    return train.main()


def fork_ranks(job: dict) -> list[int]:
    """Fork all ranks; returns their process ids."""
    pids = []
    for rank in range(job["num_processes"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = be_rank(job, rank)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def say(answer: object) -> None:
    """Write one line to standard output."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until standard input ends."""
    import torch

    from models.common.processing import load_processor
    from models.contract.families import load_architecture
    from models.training import fsdp2, megatron_engine, start  # noqa: F401 - before the first fork

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    load_processor(folder, load_architecture(folder).vision)
    say("ready")
    for line in sys.stdin:
        pids = fork_ranks(json.loads(line))
        say(pids)
        say([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


if __name__ == "__main__":
    main()
