# SPDX-License-Identifier: Apache-2.0
"""What a launcher's environment says, and what is wrong with it."""

import pytest

from models.contract.errors import ConfigError
from models.training.parallel import LauncherEnvironment, read_launcher_environment

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
    assert read_launcher_environment(TORCHRUN).rank == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "missing WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "not a number"),
        (TORCHRUN | {"RANK": "2"}, "contradict each other"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "not a number"),
    ],
)
def test_wrong_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_launcher_environment(environment)
    assert message in str(caught.value)
