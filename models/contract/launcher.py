# SPDX-License-Identifier: Apache-2.0
"""What torchrun says about a process. Torch-free: a wrong variable is told before anything heavy is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from models.contract.cluster import MAX_PORT
from models.contract.errors import ConfigError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
AGENT_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"
ATTEMPT_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
MAX_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherEnvironment:
    """What the launcher said about this process; one process without a launcher is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    is_launched: bool
    master_addr: str = ""
    master_port: int = 0
    has_agent_store: bool = False
    """torchrun's agent, not rank 0, keeps the store at which the ranks meet."""
    attempt: int = 0
    """How often torchrun has started the processes again."""


def read_launcher_environment(environment: Mapping[str, str] = os.environ) -> LauncherEnvironment:
    """Read torchrun's variables.

    Raises:
        ConfigError: some are set and others not, or they are not numbers, or contradict each other.
    """
    present = [name for name in LAUNCHER_VARIABLES if name in environment]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return LauncherEnvironment(rank=0, world_size=1, local_rank=0, is_launched=False)
    missing = [name for name in LAUNCHER_VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            "incomplete launcher environment",
            where="environment variables",
            expected=", ".join(LAUNCHER_VARIABLES),
            got=f"missing {', '.join(missing)}",
            fix="start with `python -m torch.distributed.run …`, or unset RANK and WORLD_SIZE for one process",
        )
    numbers = {name: environment[name] for name in LAUNCHER_VARIABLES if name != "MASTER_ADDR"}
    wrong = [f"{name}={text!r}" for name, text in numbers.items() if not _is_number(text)]
    if wrong:
        raise ConfigError(
            "launcher variable is not a number",
            where="environment variables",
            expected=f"{', '.join(numbers)} as whole numbers from 0",
            got=", ".join(wrong),
            fix="start with `python -m torch.distributed.run …`, which sets all of them",
        )
    rank, world_size, local_rank, port = (int(text) for text in numbers.values())
    master = environment["MASTER_ADDR"].strip()
    if not max(rank, local_rank) < world_size or not 1 <= port <= MAX_PORT or not master:
        raise ConfigError(
            "launcher variables contradict each other",
            where="environment variables",
            expected=f"RANK and LOCAL_RANK < WORLD_SIZE, a MASTER_ADDR, and MASTER_PORT from 1 to {MAX_PORT}",
            got=f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} MASTER_ADDR={master!r} "
            f"MASTER_PORT={port}",
            fix="start with `python -m torch.distributed.run …`, which sets all of them",
        )
    attempt = environment.get(ATTEMPT_VARIABLE, "0")
    return LauncherEnvironment(
        rank=rank, world_size=world_size, local_rank=local_rank, is_launched=True, master_addr=master,
        master_port=port, has_agent_store=environment.get(AGENT_STORE_VARIABLE) == "True",
        attempt=int(attempt) if _is_number(attempt) else 0,
    )  # fmt: skip


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
