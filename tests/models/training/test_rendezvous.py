# SPDX-License-Identifier: Apache-2.0
"""Ranks that wait for each other: they say so, and say who is missing and what to look at."""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from models.contract import waiting
from models.contract.errors import ConfigError, HarnessError, RunError
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training.progress import TrainOptions
from models.training.rendezvous import ranks_met
from models.training.start import train
from tests.models.training.trainer import free_port

MakeRecipe = Callable[..., Recipe]
SHORT_S, LONG_S = 0.3, 60.0
"""Waits that are to be in vain, and those that are not."""


def launched(rank: int, world_size: int = 2, port: int | None = None, **others: Any) -> LauncherEnvironment:
    return LauncherEnvironment(
        rank=rank, world_size=world_size, local_rank=rank, is_launched=True, master_addr="localhost",
        master_port=free_port() if port is None else port, **others,
    )  # fmt: skip


def host_store(port: int) -> TCPStore:
    return TCPStore("localhost", port, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)


def refusal(launcher: LauncherEnvironment, recipe: Recipe, *, timeout_s: float = SHORT_S) -> HarnessError:
    with pytest.raises(HarnessError) as caught, ranks_met(launcher, recipe, timeout_s=timeout_s):
        raise AssertionError("nobody else is there")
    return caught.value


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("has_agent_store", [False, True])
def test_ranks_meet(has_agent_store: bool, make_recipe: MakeRecipe) -> None:
    port, recipe, met = free_port(), make_recipe(), set()
    agent = host_store(port) if has_agent_store else None

    def come(rank: int) -> None:
        with ranks_met(launched(rank, 3, port, has_agent_store=has_agent_store), recipe, timeout_s=LONG_S):
            met.add(rank)
            everyone_met.wait()

    everyone_met = threading.Barrier(3, timeout=LONG_S)
    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == {0, 1, 2}
    del agent


def test_one_process_meets_nobody(make_recipe: MakeRecipe) -> None:
    alone = LauncherEnvironment(rank=0, world_size=1, local_rank=0, is_launched=False)
    with ranks_met(alone, make_recipe(), timeout_s=0.0):
        pass


def test_rank_0_says_how_many_came_and_who_did_not(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "NOTICE_AFTER_S", 0.0)
    caplog.set_level(logging.INFO, logger=waiting.__name__)
    alone = launched(0)
    error = refusal(alone, make_recipe(2))
    assert isinstance(error, RunError)
    assert error.what == "only 1 of 2 ranks came"
    assert error.where == f"MASTER_ADDR=localhost MASTER_PORT={alone.master_port}"
    assert error.expected == "WORLD_SIZE=2 processes within 0 s"
    assert error.got == "no process with RANK 1"
    assert "--peer-timeout" in error.fix
    said = f"waiting for 1 of 2 ranks at localhost:{alone.master_port} (RANK 1); "
    assert any(record.getMessage().startswith(said) for record in caplog.records)


def test_a_rank_that_came_knows_who_did_not(make_recipe: MakeRecipe) -> None:
    port = free_port()
    store = host_store(port)
    PrefixStore("qwen_harness/0", store).set("rank/0", "process 1 of elsewhere")
    error = refusal(launched(2, 12, port), make_recipe(), timeout_s=2.0)
    assert error.what == "only 2 of 12 ranks came"
    assert error.got == "no process with RANK 1, 3, 4, 5, 6, 7, 8, 9, …"


def test_rank_0_that_never_comes_is_named(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "NOTICE_AFTER_S", 0.0)
    alone = launched(1)
    error = refusal(alone, make_recipe(2))
    assert isinstance(error, RunError)
    assert (error.what, error.got) == ("rank 0 does not answer", "[Errno 111] Connection refused")
    assert "RANK=0" in error.expected
    assert f"waiting for rank 0 at localhost:{alone.master_port}; " in caplog.text


def test_a_port_that_answers_otherwise_ends_the_wait(make_recipe: MakeRecipe) -> None:
    with listener() as port:  # torch alone would wait for ever
        error = refusal(launched(1, port=port), make_recipe(2))
    assert (error.what, error.got) == (
        "rank 0 does not answer", "what listens there does not speak as rank 0 does",
    )  # fmt: skip


def test_a_port_that_is_taken_is_named(make_recipe: MakeRecipe) -> None:
    with listener() as port:
        error = refusal(launched(0, port=port), make_recipe(2), timeout_s=LONG_S)
    assert isinstance(error, ConfigError)
    assert error.what == "rank 0 cannot listen at MASTER_PORT"
    assert error.got.startswith(f"MASTER_PORT={port}: ")
    assert "address already in use" in error.got


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_without_an_address_is_named(
    rank: int, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(waiting, "LOOKUP_S", SHORT_S)
    error = refusal(launched(rank, port=29500), make_recipe(2), timeout_s=LONG_S)
    assert isinstance(error, ConfigError)
    assert error.what == "MASTER_ADDR has no address"
    assert error.got == "MASTER_ADDR='localhost': [Errno -2] Name or service not known"
    assert (
        "waiting for an address of MASTER_ADDR=localhost; " in caplog.text
    )  # at once, not after NOTICE_AFTER_S


def test_a_name_may_appear_while_the_ranks_start(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, tries = socket.getaddrinfo, []

    def late(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    with ranks_met(launched(0, 1), make_recipe(), timeout_s=LONG_S):
        assert len(tries) > 1


def test_two_processes_with_one_rank_are_named(make_recipe: MakeRecipe) -> None:
    port = free_port()
    store = host_store(port)
    PrefixStore("qwen_harness/0", store).set("rank/1", "process 7 of elsewhere")
    error = refusal(launched(1, port=port), make_recipe(2), timeout_s=LONG_S)
    assert isinstance(error, ConfigError)
    assert error.what == "two processes have one RANK"
    assert error.where.startswith("RANK=1 MASTER_ADDR=localhost")
    assert error.got.startswith("process 7 of elsewhere, and process ")


def test_a_later_attempt_of_torchrun_is_no_second_process(make_recipe: MakeRecipe) -> None:
    port = free_port()
    store = host_store(port)
    PrefixStore("qwen_harness/0", store).set("rank/0", "process 7 of elsewhere")
    again = launched(0, 1, port, has_agent_store=True, attempt=1)
    with ranks_met(again, make_recipe(), timeout_s=LONG_S):
        pass


def test_recipes_that_differ_are_refused(make_recipe: MakeRecipe) -> None:
    port, others = free_port(), make_recipe(2, optimizer={"lr": 2e-3})
    store = host_store(port)
    PrefixStore("qwen_harness/0", store).set("recipe", others.model_dump_json())
    error = refusal(launched(1, port=port), make_recipe(2), timeout_s=LONG_S)
    assert isinstance(error, ConfigError)
    assert error.what == "the ranks have different recipes"
    assert error.got == "optimizer.lr: 0.002 with the first rank, 0.001 here"


def test_rank_0_that_leaves_ends_the_wait(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    stores = [host_store(port)]
    pause = waiting.Wait.pause

    def rank_0_leaves(*arguments: Any) -> bool:
        stores.clear()
        return pause(*arguments)

    monkeypatch.setattr(waiting.Wait, "pause", rank_0_leaves)
    error = refusal(launched(1, port=port), make_recipe(2), timeout_s=LONG_S)
    assert isinstance(error, RunError)
    assert error.what == "rank 0 left while the ranks were meeting"


@pytest.fixture
def rank_0_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in (values | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("rank_0_of_2")
def test_a_run_whose_ranks_did_not_come_leaves_no_directory(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="only 1 of 2 ranks came"):
        train(make_recipe(2), site, tmp_path / "run", TrainOptions(peer_timeout_s=SHORT_S))
    assert not (tmp_path / "run").exists()  # the same command may be given again


@pytest.mark.usefixtures("rank_0_of_2")
def test_what_one_rank_can_tell_alone_is_told_without_the_others(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="wrong number of processes"):
        train(make_recipe(1), site, tmp_path / "run", TrainOptions(peer_timeout_s=LONG_S))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(make_recipe(2), site, tmp_path / "run", TrainOptions(peer_timeout_s=LONG_S))
