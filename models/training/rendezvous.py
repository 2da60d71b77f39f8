# SPDX-License-Identifier: Apache-2.0
"""Where the processes of a run find each other: a store at MASTER_ADDR:MASTER_PORT, kept by rank 0 or torchrun's agent.

torch waits in silence, and for ever where something else listens at the port. Here a rank that waits says for whom, and
when its time is over which ranks are missing and which variable to look at.
"""

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from models.contract.errors import ConfigError, RunError
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe, differences
from models.contract.waiting import Wait, look_up

CONNECT_S = 5.0
ALL_HERE = "all"
MAX_LISTED_RANKS = 8


@contextmanager
def ranks_met(launcher: LauncherEnvironment, recipe: Recipe, *, timeout_s: float) -> Iterator[None]:
    """Wait until every rank is there; rank 0 keeps the store for torch to meet at, too, while the block runs.

    Raises:
        ConfigError: MASTER_ADDR has no address, MASTER_PORT is taken, two processes have one RANK, or recipes differ.
        RunError: ranks did not come in time, or rank 0 left.
    """
    if not launcher.is_launched:
        yield
        return
    wait = Wait(timeout_s)
    look_up(launcher.master_addr, launcher.master_port, source="MASTER_ADDR", timeout_s=timeout_s)
    is_host = launcher.rank == 0 and not launcher.has_agent_store
    whole = _host(launcher, wait) if is_host else _join(launcher, wait)
    store = PrefixStore(f"qwen_harness/{launcher.attempt}", whole)
    try:
        _announce(store, launcher, recipe)
        _await_all(store, launcher, wait)
    except (DistNetworkError, DistStoreError) as error:
        raise RunError(
            "rank 0 left while the ranks were meeting", where=_variables(launcher), got=_first_line(error),
            fix="its own error says why",
        ) from None  # fmt: skip
    yield


def _host(launcher: LauncherEnvironment, wait: Wait) -> Store:
    try:
        return TCPStore(
            "localhost", launcher.master_port, is_master=True, timeout=timedelta(seconds=wait.timeout_s),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except DistNetworkError as error:
        raise ConfigError(
            "rank 0 cannot listen at MASTER_PORT", where="environment variables",
            expected="a port that is free on the host of rank 0",
            got=f"MASTER_PORT={launcher.master_port}: {_first_line(error)}",
            fix="choose another port for all ranks; a run before this one, another program, or a second process with "
            "RANK=0 may hold it",
        ) from None  # fmt: skip


def _join(launcher: LauncherEnvironment, wait: Wait) -> Store:
    """Connect once something listens: torch would write a stack trace a try."""
    while True:
        try:
            socket.create_connection((launcher.master_addr, launcher.master_port), timeout=CONNECT_S).close()
        except OSError as error:
            problem = str(error)
        else:
            break
        if not wait.pause(logging.WARNING, f"rank 0 at {_address(launcher)}"):
            raise _unanswered(launcher, wait, problem)
    found: list[Store | str] = []

    def connect() -> None:
        try:
            found.append(
                TCPStore(
                    launcher.master_addr, launcher.master_port, is_master=False,
                    timeout=timedelta(seconds=wait.timeout_s), wait_for_workers=False,
                )
            )  # fmt: skip
        except (DistNetworkError, DistStoreError) as error:
            found.append(_first_line(error))

    # torch's own limit does not hold for what takes the connection and says nothing
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(wait.left_s)
    store = found[0] if found else "what listens there does not speak as rank 0 does"
    if isinstance(store, str):
        raise _unanswered(launcher, wait, store)
    return store


def _unanswered(launcher: LauncherEnvironment, wait: Wait, problem: str) -> RunError:
    return RunError(
        "rank 0 does not answer", where=_variables(launcher), got=problem,
        expected=f"the process with RANK=0, within {wait.timeout_s:.0f} s",
        fix="start it on that host with the same MASTER_ADDR and MASTER_PORT, and let the port through between the "
        "hosts; --peer-timeout waits longer",
    )  # fmt: skip


def _announce(store: Store, launcher: LauncherEnvironment, recipe: Recipe) -> None:
    """Say that this rank is here, once, with the recipe that all ranks have."""
    me = f"process {os.getpid()} of {socket.gethostname()}"
    there = store.compare_set(_key(launcher.rank), "", me).decode()
    if there != me:
        raise ConfigError(
            "two processes have one RANK", where=f"RANK={launcher.rank} {_variables(launcher)}",
            expected=f"each rank from 0 to {launcher.world_size - 1} once", got=f"{there}, and {me}",
            fix="give every process a RANK of its own, and every run a MASTER_PORT of its own",
        )  # fmt: skip
    mine = recipe.model_dump(mode="json")
    first = json.loads(store.compare_set("recipe", "", json.dumps(mine)))
    if first != mine:
        raise ConfigError(
            "the ranks have different recipes", where=f"rank {launcher.rank}, recipe {recipe.name}",
            got="; ".join(differences(first, mine, "with the first rank", "here")),
            fix="start all ranks with one recipe file",
        )  # fmt: skip


def _await_all(store: Store, launcher: LauncherEnvironment, wait: Wait) -> None:
    """Rank 0 looks for every rank and says when all are there; the others wait for its word."""
    size, level = launcher.world_size, logging.INFO if launcher.rank == 0 else logging.DEBUG
    missing = range(size)
    while not store.check([ALL_HERE]):
        if launcher.rank == 0:
            missing = _missing(store, missing)
            if not missing:
                store.set(ALL_HERE, "")
                return
        place = f"{len(missing)} of {size} ranks at {_address(launcher)} (RANK {_listed(missing)})"
        if not wait.pause(level, place):
            raise _incomplete(launcher, wait, _missing(store, missing))


def _incomplete(launcher: LauncherEnvironment, wait: Wait, missing: Sequence[int]) -> RunError:
    size = launcher.world_size
    return RunError(
        f"only {size - len(missing)} of {size} ranks came", where=_variables(launcher),
        expected=f"WORLD_SIZE={size} processes within {wait.timeout_s:.0f} s",
        got=f"no process with RANK {_listed(missing)}",
        fix="start them with the same MASTER_ADDR and MASTER_PORT, or look why they ended; `python -m "
        "torch.distributed.run` starts all ranks of a host; unset RANK and WORLD_SIZE for one process; --peer-timeout "
        "waits longer",
    )  # fmt: skip


def _missing(store: Store, ranks: Sequence[int]) -> Sequence[int]:
    return [rank for rank in ranks if not store.check([_key(rank)])]


def _listed(ranks: Sequence[int]) -> str:
    more = ["…"] if len(ranks) > MAX_LISTED_RANKS else []
    return ", ".join([*map(str, ranks[:MAX_LISTED_RANKS]), *more])


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _address(launcher: LauncherEnvironment) -> str:
    return f"{launcher.master_addr}:{launcher.master_port}"


def _variables(launcher: LauncherEnvironment) -> str:
    return f"MASTER_ADDR={launcher.master_addr} MASTER_PORT={launcher.master_port}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
