# SPDX-License-Identifier: Apache-2.0
"""The command line of training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.entry.train import parse_arguments

REPOSITORY = Path(__file__).parents[3]
NEEDED = ["--recipe", "r.toml", "--run-dir", "run"]
RECIPE = """
name = "test"
num_processes = 2
model = {family = "qwen3_vl", checkpoint = "none"}
data = {dataset = "none", seq_length = 128}
train = {train_iters = 1, micro_batch_size = 1, global_batch_size = 2}
optimizer = {lr = 1e-3}
"""


def test_waiting_has_limits() -> None:
    arguments = parse_arguments(NEEDED)
    assert (arguments.step_timeout, arguments.peer_timeout) == (1800.0, 600.0)
    assert parse_arguments([*NEEDED, "--peer-timeout", "0.5"]).peer_timeout == 0.5


@pytest.mark.parametrize("option", ["--step-timeout", "--peer-timeout"])
@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "soon"])
def test_a_limit_that_is_none_is_refused(option: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*NEEDED, option, wrong])
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--stop-after", "--trace"])
@pytest.mark.parametrize("wrong", ["0", "-1", "last"])
def test_an_iteration_that_is_none_is_refused(
    option: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*NEEDED, option, wrong])
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rank_that_was_started_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    values = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "models.entry.train", *NEEDED, "--peer-timeout", "0.1"]
    ended = subprocess.run(
        command, env=os.environ | values | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert (
        "[rank 1] RunError: rank 0 does not answer\n  where:    MASTER_ADDR=localhost MASTER_PORT=1"
        in ended.stderr
    )
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
