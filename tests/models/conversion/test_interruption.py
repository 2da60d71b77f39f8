# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed, interrupted or out of space: nothing under the final name, and the rest is done later.

The program runs in a process of its own and gets a real signal while it writes.
"""

import filecmp
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.conversion import sinks
from models.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from models.conversion.tiny import write_tiny_checkpoint

WORKER = Path(__file__).with_name("interrupted_worker.py")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "hf"
    return write_tiny_checkpoint(folder, "qwen3_vl", init="coded", dtype=torch.bfloat16)


def run(what: str, count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), what, str(count), *map(str, arguments)],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def finish_and_count(source: Path, target: Path, monkeypatch) -> tuple[int, int]:
    """Run the same conversion to its end; files that were there, and files that were written now."""
    monkeypatch.setattr(sinks, "FILE_BYTES", 2**17)
    journal = target.with_name(f".{target.name}.partial") / "journal"
    before = len(list(journal.glob("*.json")))
    written = []
    write = sinks.write_sharded
    monkeypatch.setattr(
        "models.conversion.convert.write_sharded",
        lambda file, *rest: (written.append(file.path), write(file, *rest))[1],
    )
    assert hf_to_megatron(source, target, Options()).complete
    back = target.with_name("back")
    megatron_to_hf(target, back, source, Options())
    names = [file.name for file in source.iterdir()]
    assert filecmp.cmpfiles(source, back, names, shallow=False)[1:] == ([], [])
    return before, len(written)


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_stopped_conversion_continues_where_it_stopped(source, tmp_path, monkeypatch, name) -> None:
    target = tmp_path / "m"
    done = run(name, 60, "hf-to-megatron", source, target)
    assert not target.exists()
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
    else:
        assert (done.returncode, done.stderr.count("interrupted: nothing is under")) == (130, 1)
        assert "Traceback" not in done.stderr
    before, written = finish_and_count(source, target, monkeypatch)
    total = len(list((target / "release").glob("*.distcp"))) - 1  # the last one holds the objects
    assert before >= 1
    assert before + written == total
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m"]


@pytest.mark.slow
def test_limit_on_file_size_is_one_error_and_is_continued(source, tmp_path, monkeypatch) -> None:
    target = tmp_path / "m"
    done = run("RLIMIT", 100_000, "hf-to-megatron", source, target)
    assert done.returncode == 1
    assert done.stderr.count("RunError") == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    finish_and_count(source, target, monkeypatch)
