# SPDX-License-Identifier: Apache-2.0
"""The launcher, on small programs that write run directories as training does."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.hardware import REPOSITORY
from harness.launch import (
    ATTEMPTS_FILE,
    LAUNCH_LOG,
    LaunchResult,
    Watch,
    child_environment,
    classify_failure,
    failure_reason,
    launch,
    look_for_first_node,
    read_attempts,
    train_command,
)
from models.contract import waiting
from models.contract.cluster import ONE_NODE, Cluster, read_cluster
from models.contract.errors import ConfigError, RunError

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run_dir = Path(sys.argv[1])
def step(n):
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"iteration": n, "lm_loss": 1.0}) + "\\n")
def phase(name):
    (run_dir / "run.json").write_text(json.dumps({"outcome": {"phase": name}}))
"""
ECC = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"


def program(body: str, run_dir: Path) -> list[str]:
    return [sys.executable, "-c", PRELUDE + body, str(run_dir)]


def test_launch_completes_and_reports_progress(tmp_path: Path) -> None:
    seen: list[int] = []
    command = program("phase('training'); step(1); step(2); phase('done'); print('hello')", tmp_path)
    result = launch(command, tmp_path, watch=Watch(progress=lambda iteration, _: seen.append(iteration)))
    assert result.completed
    assert result.last.last_iteration == 2
    assert seen == [1, 2]
    assert (tmp_path / LAUNCH_LOG).read_text() == "hello\n"
    assert [attempt["kind"] for attempt in read_attempts(tmp_path)] == ["completed"]


def test_launch_retries_infrastructure_failure_before_the_first_iteration(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    body = f"""
flag = Path({str(flag)!r})
phase('startup')
if not flag.exists():
    flag.write_text("")
    raise OSError(28, "No space left on device")
step(1); phase('done')
"""
    run_dir = tmp_path / "run"
    result = launch(program(body, run_dir), run_dir)
    assert [attempt.kind for attempt in result.attempts] == ["infra", "completed"]
    assert result.attempts[0].reason == "OSError: [Errno 28] No space left on device"
    # the first attempt is kept whole, beside the one that counts
    assert (run_dir / "attempt-1" / LAUNCH_LOG).is_file()
    assert (run_dir / "attempt-1" / "run.json").is_file()
    assert len(read_attempts(run_dir)) == 2


def test_launch_gives_up_after_two_retries(tmp_path: Path) -> None:
    result = launch(program("raise ConnectionRefusedError('Connection refused')", tmp_path), tmp_path)
    assert [attempt.kind for attempt in result.attempts] == ["infra"] * 3


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("step(1); phase('training'); raise OSError(28, 'No space left on device')", "result"),
        ("raise RuntimeError('shapes differ')", "result"),
        ("sys.stderr.write('ConfigError: unknown key\\n'); sys.exit(1)", "refused"),
    ],
)
def test_launch_never_retries_a_result(body: str, kind: str, tmp_path: Path) -> None:
    result = launch(program(body, tmp_path), tmp_path)
    assert [attempt.kind for attempt in result.attempts] == [kind]


def test_launch_stops_when_time_is_over(tmp_path: Path) -> None:
    result = launch(program("time.sleep(600)", tmp_path), tmp_path, watch=Watch(time_budget_s=0.5))
    assert [attempt.kind for attempt in result.attempts] == ["timeout"]


def test_launch_stops_the_whole_tree(tmp_path: Path) -> None:
    cancel = threading.Event()
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(run_dir / "child").write_text(str(child.pid))
step(1)
time.sleep(600)
"""
    with pytest.raises(KeyboardInterrupt):
        launch(
            program(body, tmp_path), tmp_path, watch=Watch(cancel=cancel, progress=lambda *_: cancel.set())
        )
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_launch_records_an_interrupted_attempt(tmp_path: Path) -> None:
    cancel = threading.Event()
    body = "signal.signal(signal.SIGTERM, lambda *_: (phase('done'), sys.exit(3)))\nstep(1)\ntime.sleep(600)"
    watch = Watch(cancel=cancel, progress=lambda *_: cancel.set())
    with pytest.raises(KeyboardInterrupt):
        launch(program(body, tmp_path), tmp_path, watch=watch)
    (attempt,) = read_attempts(tmp_path)
    assert attempt["kind"] == "interrupted"
    assert json.loads((tmp_path / "run.json").read_text())["outcome"]["phase"] == "done"


def test_launch_treats_sigterm_as_an_interrupt(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    watch = Watch(progress=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        launch(program("step(1)\ntime.sleep(600)", tmp_path), tmp_path, watch=watch)
    assert read_attempts(tmp_path)[0]["kind"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_launch_never_overwrites_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="already holds a run"):
        launch(["true"], tmp_path)
    assert not (tmp_path / ATTEMPTS_FILE).exists()


@pytest.mark.parametrize(
    ("log", "exit_code", "iteration", "phase", "expected"),
    [
        (ECC, 1, 0, "startup", "infra"),
        (ECC, 1, 7, "training", "result"),
        (f"[rank3]: {ECC}", 1, 0, "", "infra"),
        # one rank's own mistake makes the others lose their connection: the mistake decides
        (
            "ValueError: bad shape\n[rank1]: ConnectionResetError: Connection reset by peer",
            1,
            0,
            "startup",
            "result",
        ),
        ("torch.distributed.DistNetworkError: The client socket has timed out", 1, 0, "startup", "infra"),
        ("[rank 0] RunError: only 1 of 2 ranks came\n  where:    …", 1, 0, "", "infra"),
        ("[rank 1] RunError: rank 0 does not answer", 1, 0, "", "infra"),
        ("[rank 0] RunError: the held-out set is exhausted", 1, 0, "startup", "refused"),
        ("loading\n", -9, 0, "startup", "infra"),
        ("RuntimeError: found NaN in local grad norm", 1, 12, "training", "result"),
        (
            "AssertionError: x\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n",
            1,
            0,
            "",
            "result",
        ),
        ("", 0, 500, "done", "completed"),
    ],
)
def test_classify_failure_goes_by_phase_and_exception(
    log: str, exit_code: int, iteration: int, phase: str, expected: str
) -> None:
    kind, _ = classify_failure(exit_code=exit_code, log=log, last_iteration=iteration, phase=phase)
    assert kind == expected


def test_failure_reason_prefers_our_own_error() -> None:
    log = (
        "Traceback …\nKeyError: 'x'\n[rank 0] DataError: dataset not found\n  where:    /data\n  fix:      make it\n"
        "Traceback …\n"
    )
    assert failure_reason(log, 1) == "DataError: dataset not found; where: /data; fix: make it"
    assert (
        failure_reason("[rank 0] DataError: dataset not found\n  fixture: x", 1)
        == "DataError: dataset not found"
    )
    assert failure_reason("nothing of use", -9) == "ended by SIGKILL"
    assert failure_reason("nothing of use", 7) == "exit code 7"


TWO_NODES = [Cluster(num_nodes=2, node_rank=rank, master_addr="gpu07", master_port=29501) for rank in (0, 1)]


def test_train_command_of_a_node_names_the_others(tmp_path: Path) -> None:
    command = train_command(tmp_path / "r.toml", tmp_path / "run", 16, None, TWO_NODES[1])
    text = " ".join(command)
    assert "--nnodes=2 --node-rank=1 --master-addr=gpu07 --master-port=29501 --nproc-per-node=8" in text
    assert "--standalone" not in text
    with pytest.raises(ConfigError, match="do not divide over the nodes"):
        train_command(tmp_path / "r.toml", tmp_path / "run", 15, None, TWO_NODES[1])


def test_nodes_say_where_they_meet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    look_for_first_node(ONE_NODE)
    assert not caplog.records
    look_for_first_node(read_cluster("hosts", {}, hosts=["127.0.0.1", "b"], this_host="b"))
    assert "node 1 of 0 to 1: they meet at 127.0.0.1:29500" in caplog.text


@pytest.mark.parametrize(
    ("cluster", "source"),
    [
        (read_cluster("hosts", {}, hosts=["gpu07", "b"], this_host="b"), "--hosts"),
        (
            read_cluster("dlc", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "gpu07"}),
            "MASTER_ADDR",
        ),
        (
            read_cluster(
                "slurm",
                {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"},
            ),
            "SLURM_JOB_NODELIST",
        ),
    ],
)
def test_a_first_node_without_an_address_is_named(
    cluster: Cluster, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(waiting, "LOOKUP_S", 0.0)
    with pytest.raises(ConfigError, match=f"{source} has no address") as caught:
        look_for_first_node(cluster)
    assert "gpu07" in caught.value.got


def test_only_the_first_node_keeps_the_record_and_none_retries(tmp_path: Path) -> None:
    failing = program("raise ConnectionRefusedError('Connection refused')", tmp_path)
    assert len(launch(failing, tmp_path, cluster=TWO_NODES[1]).attempts) == 1
    assert "Connection refused" in (tmp_path / "launch-node-1.log").read_text()
    assert read_attempts(tmp_path) == []
    first = launch(failing, tmp_path, cluster=TWO_NODES[0])  # what the other node wrote is in nobody's way
    assert [attempt.kind for attempt in first.attempts] == ["infra"]
    assert len(read_attempts(tmp_path)) == 1


def test_launch_leaves_no_process_behind_that_its_parent_left(tmp_path: Path) -> None:
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(run_dir / "child").write_text(str(child.pid))
os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is out: nobody stops the child
"""
    assert launch(program(body, tmp_path), tmp_path).last.exit_code == -signal.SIGKILL
    for pid in [int((tmp_path / "child").read_text())]:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_a_killed_launcher_started_stops_in_good_order(tmp_path: Path) -> None:
    body = """
def leave(*_):
    phase("done")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
(run_dir / "child").write_text(str(os.getpid()))
step(1)
time.sleep(600)
"""
    launcher = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys; from pathlib import Path; from harness.launch import launch; "
            "launch(sys.argv[2:], Path(sys.argv[1]))",
            str(tmp_path), *program(body, tmp_path),
        ],
        cwd=REPOSITORY,
    )  # fmt: skip
    while not (tmp_path / "metrics.jsonl").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    launcher.kill()
    launcher.wait()
    try:
        child.wait(timeout=60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert json.loads((tmp_path / "run.json").read_text())["outcome"]["phase"] == "done"


@pytest.mark.slow
def test_two_nodes_train_together(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        PRELUDE
        + """
import torch
from torch import distributed
distributed.init_process_group("gloo")
total = torch.tensor([distributed.get_rank() + 1.0])
distributed.all_reduce(total)
if distributed.get_rank() == 0:
    phase("training"); step(int(total)); phase("done")
distributed.barrier()
distributed.destroy_process_group()
"""
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: dict[int, LaunchResult] = {}

    def start(rank: int) -> None:
        environment = {"MASTER_PORT": str(port)}
        hosts = ["127.0.0.1", "other"]
        cluster = read_cluster("hosts", environment, hosts=hosts, this_host=hosts[rank])
        command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *cluster.torchrun_arguments(1), str(script),
            str(tmp_path / "run"),
        ]  # fmt: skip
        results[rank] = launch(
            command, tmp_path / "run", cluster=cluster, environment=child_environment("cpu", 1)
        )

    threads = [threading.Thread(target=start, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result.completed for result in results.values())
    assert results[0].last.last_iteration == 3  # 1 + 2: both nodes took part
    assert (tmp_path / "run" / "launch-node-1.log").is_file()
