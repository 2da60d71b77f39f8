# SPDX-License-Identifier: Apache-2.0
"""What a launcher's environment says, and what is wrong with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.contract.errors import ConfigError
from models.contract.launcher import LauncherEnvironment, read_launcher_environment

REPOSITORY = Path(__file__).parents[3]
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_no_launcher_is_one_process() -> None:
    assert read_launcher_environment({}) == LauncherEnvironment(
        rank=0, world_size=1, local_rank=0, is_launched=False
    )


def test_torchrun_variables_are_read() -> None:
    assert read_launcher_environment(TORCHRUN) == LauncherEnvironment(
        rank=1, world_size=2, local_rank=1, is_launched=True, master_addr="localhost", master_port=29500
    )
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    found = read_launcher_environment(TORCHRUN | agent)
    assert (found.has_agent_store, found.attempt) == (True, 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "missing WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "got:      WORLD_SIZE='two'"),
        (TORCHRUN | {"MASTER_PORT": "http", "RANK": "-1"}, "got:      RANK='-1', MASTER_PORT='http'"),
        (TORCHRUN | {"LOCAL_RANK": "²"}, "LOCAL_RANK='²'"),
        (TORCHRUN | {"RANK": "2"}, "got:      RANK=2 WORLD_SIZE=2"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        (TORCHRUN | {"MASTER_PORT": "9" * 5000}, "MASTER_PORT='999"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        (TORCHRUN | {"MASTER_ADDR": " "}, "MASTER_ADDR=''"),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}, "missing LOCAL_RANK"),
    ],
)
def test_wrong_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_launcher_environment(environment)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"RANK": "0"}, "[rank 0] ConfigError: incomplete launcher environment"),
        (TORCHRUN | {"RANK": "5"}, "[rank 5] ConfigError: launcher variables contradict each other"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, "[rank 1] ConfigError: launcher variable is not a number"),
    ],
)
def test_training_says_nothing_but_what_is_wrong(wrong: dict[str, str], message: str, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    command = [sys.executable, "-m", "models.entry.train", "--recipe", "none.toml", "--run-dir", "run"]
    ended = subprocess.run(
        command, env=clean | wrong | {"PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[0] == message
    assert not (tmp_path / "run").exists()
