# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed, interrupted or out of space: nothing under the final name, and the rest is done later.

The program runs in a process of its own and gets a real signal while it writes.
"""

import contextlib
import filecmp
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion import sinks
from models.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from models.conversion.tiny import write_tiny_checkpoint

WORKER = Path(__file__).with_name("interrupted_worker.py")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "hf"
    return write_tiny_checkpoint(folder, "qwen3_vl", init="coded", dtype=torch.bfloat16)


def run(what: str, whom: str, count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program in a process group of its own, none of which may live on."""
    command = [sys.executable, "-W", "ignore", str(WORKER), what, whom, str(count), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=REPOSITORY, start_new_session=True,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            code = process.wait(
                timeout=300
            )  # a guard against hanging; starting takes a minute on a busy machine
            deadline = time.monotonic() + 10
            while alive(process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not alive(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stderr.seek(0)
        return subprocess.CompletedProcess(command, code, "", stderr.read())


def alive(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(file.parent.name)
    return found


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
    assert hf_to_megatron(source, target, Options(workers=1)).complete
    back = target.with_name("back")
    megatron_to_hf(target, back, source, Options())
    names = [file.name for file in source.iterdir()]
    assert filecmp.cmpfiles(source, back, names, shallow=False)[1:] == ([], [])
    return before, len(written)


@pytest.mark.parametrize(
    ("name", "whom", "workers"),
    [
        ("SIGKILL", "parent", 2),
        pytest.param("SIGINT", "group", 2, marks=pytest.mark.slow),
        pytest.param("SIGKILL", "self", 2, marks=pytest.mark.slow),
        pytest.param("SIGKILL", "self", 1, marks=pytest.mark.slow),
        pytest.param("SIGINT", "self", 1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_stopped_conversion_continues_where_it_stopped(
    source, tmp_path, monkeypatch, name, whom, workers
) -> None:
    target = tmp_path / "m"
    done = run(name, whom, 40 // workers, "hf-to-megatron", source, target, "--workers", workers)
    assert not target.exists()
    assert "Traceback" not in done.stderr
    if name == "SIGINT":
        assert (done.returncode, done.stderr.count("interrupted: nothing is under")) == (130, 1)
    elif (whom, workers) == ("self", 2):
        assert (done.returncode, done.stderr.count("RunError: a worker process died")) == (1, 1)
        assert str(tmp_path / ".m.partial") in done.stderr
        assert "same command" in done.stderr
    else:
        assert done.returncode == -signal.SIGKILL
    before, written = finish_and_count(source, target, monkeypatch)
    total = len(list((target / "release").glob("*.distcp"))) - 1  # the last one holds the objects
    assert before >= 1
    assert written >= 1
    assert before + written == total
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m"]


def test_names_of_values_that_are_not_finite_outlive_a_kill(source, tmp_path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    for shard in broken.glob("*.safetensors"):
        tensors = load_file(shard)
        for tensor in tensors.values():
            tensor.view(-1)[:1].fill_(float("nan"))
        save_file(tensors, shard, metadata={"format": "pt"})
    names = hf_to_megatron(broken, tmp_path / "whole", Options()).not_finite
    done = run("SIGKILL", "self", 60, "hf-to-megatron", broken, tmp_path / "m", "--workers", 1)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / ".m.partial" / "journal").glob("*.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "FILE_BYTES", 2**17)
        assert hf_to_megatron(broken, tmp_path / "m", Options()).not_finite == names
    assert len(names) > 50


@pytest.mark.slow
def test_limit_on_file_size_is_one_error_and_is_continued(source, tmp_path, monkeypatch) -> None:
    target = tmp_path / "m"
    done = run("RLIMIT", "self", 100_000, "hf-to-megatron", source, target)
    assert done.returncode == 1
    assert done.stderr.count("RunError") == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    finish_and_count(source, target, monkeypatch)
