# SPDX-License-Identifier: Apache-2.0
"""Starts one training run and watches it: torchrun in its own process group, attempts, time budget, failures.

The child writes the run directory; this module adds `launch.log` (everything the processes printed) and
`attempts.json`. A failure is classified by the phase it happened in and by its exception:

    before iteration 1, an infrastructure exception    infra      retried, at most twice
    before iteration 1, an error of ours (ConfigError…) refused   the recipe, data or checkpoint is wrong: not retried
    anything later, or any other exception             result     what the code does: never retried
    past the time budget                               timeout    killed with its whole process group, not retried
    Ctrl-C or a termination signal                     interrupted

An attempt that is retried is moved to `attempt-N/` inside the run directory, so nothing is lost.

On several nodes every node launches the same command over a run directory that they share. The first one keeps the
record; the others write `launch-node-N.log`. Nothing is retried there: the nodes would have to agree on it.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from harness.cases import Case
from harness.hardware import REPOSITORY
from harness.telemetry import telemetry_recorded
from models.contract.cluster import ONE_NODE, Cluster, processes_per_node
from models.contract.errors import RunError
from models.contract.record import METRICS_FILE, RUN_FILE
from models.contract.sentinel import SENTINEL_PREFIX
from models.contract.waiting import look_up
from models.contract.whole_file import write_whole

logger = logging.getLogger(__name__)

LAUNCH_LOG = "launch.log"
ATTEMPTS_FILE = "attempts.json"
MAX_INFRA_RETRIES = 2
RUN_VARIABLE = "QWEN_HARNESS_RUN_DIR"
"""Marks every process of a launch, so that none outlives it."""
TIED = Path(__file__).with_name("tied.py")
"""Started first, so that the processes end even when this one is killed."""
GRACE_SECONDS = 40.0
"""Between asking a process group to stop and killing it; torchrun gives its workers 30."""
TORCHRUN_PATIENCE_S = 600
"""How long torchrun's static rendezvous waits for the other nodes."""

AttemptKind = Literal["completed", "infra", "refused", "result", "timeout", "interrupted"]

# Exceptions that say something about the machine when they come before the first iteration.
_INFRA_PATTERNS = (
    r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|HCCL",
    r"DistNetworkError|DistStoreError|RendezvousConnectionError|RendezvousTimeoutError",
    r"gloo.*(timed? ?out|refused|reset)",
    r"Address already in use|EADDRINUSE|Connection (refused|reset)|Network is unreachable",
    r"uncorrectable ECC|Xid \d+|GPU has fallen off the bus|device unavailable|CUDA-capable device\(s\) is/are busy",
    r"No space left on device|Stale file handle|Input/output error|Remote I/O error",
    r"Cannot allocate memory|DefaultCPUAllocator: can't allocate",
    r"RunError: (only \d+ of \d+ ranks came|rank 0 does not answer|rank 0 left while)",
)
_OUR_ERRORS = re.compile(
    r"^(?:\[[^\]]*\]:?)?\s*(?:[\w.]+\.)?"
    r"(ConfigError|DataError|WeightMappingError|ShapeError|EnvironmentMismatch|BaselineError|RunError): (.*)$",
    re.MULTILINE,
)
_ERROR_ROWS = re.compile(r"(?:\n {2}(?:where|expected|got|fix): .*)*")
_EXCEPTION_LINE = re.compile(
    r"^(?:\[[^\]]*\]:?)?\s*((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit|Mismatch))(?:: (.*))?$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the training processes."""

    number: int
    started_at: str
    duration_s: float
    exit_code: int
    """Of torchrun; negative: the signal that ended it."""
    kind: AttemptKind
    phase: str
    """`startup` before the first iteration has finished, else `training`, `saving` or `done`."""
    last_iteration: int
    reason: str
    directory: str
    """Where this attempt's files are, relative to the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchResult:
    """A run that was started, however it ended."""

    run_dir: Path
    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt:
        """The attempt whose files are in the run directory."""
        return self.attempts[-1]

    @property
    def completed(self) -> bool:
        """Whether the last attempt reached its end."""
        return self.last.kind == "completed"


Progress = Callable[[int, dict[str, Any]], None]
"""Called with the last finished iteration and its metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a launch is watched."""

    time_budget_s: float | None = None
    """Wall-clock limit of one attempt; its whole process group is stopped when it is over."""
    progress: Progress | None = None
    cancel: threading.Event | None = None
    """Set by another thread to stop as Ctrl-C would."""


def train_command(
    recipe_file: Path,
    run_dir: Path,
    num_processes: int,
    site_file: Path | None,
    cluster: Cluster = ONE_NODE,
) -> list[str]:
    """Command line of one training run, on this node.

    Raises:
        ConfigError: the processes do not divide over the nodes.
    """
    site = ["--site", str(site_file)] if site_file else []
    program = ["models.entry.train", "--recipe", str(recipe_file), "--run-dir", str(run_dir), *site]
    return torchrun_command(program, num_processes, cluster)


def torchrun_command(program: list[str], num_processes: int, cluster: Cluster = ONE_NODE) -> list[str]:
    """Command line of a module and its arguments in `num_processes` processes, on this node.

    Raises:
        ConfigError: the processes do not divide over the nodes.
    """
    nodes = cluster.torchrun_arguments(processes_per_node(num_processes, cluster.num_nodes))
    return [sys.executable, "-m", "torch.distributed.run", *nodes, "-m", *program]


def look_for_first_node(cluster: Cluster) -> None:
    """Check that the nodes of a run can meet, and say where: torchrun waits without a word.

    Raises:
        ConfigError: the first node has no address.
    """
    if cluster.num_nodes == 1:
        return
    look_up(cluster.master_addr, cluster.master_port, source=cluster.master_source)
    logger.info(
        "node %d of 0 to %d: they meet at %s:%d and have %d s to come",
        cluster.node_rank, cluster.num_nodes - 1, cluster.master_addr, cluster.master_port, TORCHRUN_PATIENCE_S,
    )  # fmt: skip


def launch_case(
    case: Case,
    run_dir: Path,
    *,
    site_file: Path | None = None,
    num_threads: int | None = None,
    watch: Watch | None = None,
    cluster: Cluster = ONE_NODE,
) -> LaunchResult:
    """Train one case. `num_threads` limits the threads of each process on a CPU."""
    command = train_command(case.recipe_file, run_dir, case.recipe.num_processes, site_file, cluster)
    environment = child_environment(case.hardware, num_threads)
    if case.recipe.train.engine == "megatron" and case.hardware not in ("cpu", "b200"):
        # mcore's overlap of communication needs a single hardware queue before Blackwell; FSDP2 is slowed by it
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    num_devices = processes_per_node(case.recipe.num_processes, cluster.num_nodes)
    with devices_watched(case.hardware, run_dir, num_devices, environment, cluster.node_rank):
        return launch(command, run_dir, environment=environment, watch=watch, cluster=cluster)


def devices_watched(
    hardware: str, run_dir: Path, num_devices: int, environment: dict[str, str], node_rank: int
) -> AbstractContextManager[None]:
    """Record what the devices of this node do while the block runs; nothing on a CPU."""
    if hardware == "cpu":
        return contextlib.nullcontext()
    return telemetry_recorded(
        run_dir, num_devices=num_devices, environment=environment, marker=(RUN_VARIABLE, str(run_dir)),
        node_rank=node_rank,
    )  # fmt: skip


def launch(
    command: list[str],
    run_dir: Path,
    *,
    environment: dict[str, str] | None = None,
    watch: Watch | None = None,
    cluster: Cluster = ONE_NODE,
) -> LaunchResult:
    """Run `command`, which writes `run_dir`, to its end; retry infrastructure failures before iteration 1.

    Raises:
        RunError: `run_dir` already holds a run.
        KeyboardInterrupt: after the processes were stopped and the attempt was recorded.
    """
    require_new(run_dir, cluster)
    keeps_record = cluster.node_rank == 0
    run_dir.mkdir(parents=True, exist_ok=True)
    log = LAUNCH_LOG if keeps_record else f"launch-node-{cluster.node_rank}.log"
    environment = (environment or dict(os.environ)) | {RUN_VARIABLE: str(run_dir)}
    max_retries = MAX_INFRA_RETRIES if cluster.num_nodes == 1 else 0
    attempts: list[Attempt] = []
    while True:
        attempt, interrupt = _one_attempt(
            command, run_dir, len(attempts) + 1, environment, watch or Watch(), log
        )
        retry = attempt.kind == "infra" and len(attempts) < max_retries
        if retry:
            attempt = _set_aside(run_dir, attempt)
        attempts.append(attempt)
        if keeps_record:
            _write_attempts(run_dir, attempts)
        if interrupt is not None:
            raise interrupt
        if not retry:
            return LaunchResult(run_dir=run_dir, attempts=tuple(attempts))
        logger.warning(
            "attempt %d failed before iteration 1, trying again: %s", attempt.number, attempt.reason
        )


def require_new(run_dir: Path, cluster: Cluster = ONE_NODE) -> None:
    """Check, on the first node, that no run is there yet.

    Raises:
        RunError: there is one.
    """
    if cluster.node_rank == 0 and any((run_dir / name).exists() for name in (RUN_FILE, ATTEMPTS_FILE)):
        raise RunError(
            "the run directory already holds a run",
            where=str(run_dir),
            expected="a new or empty folder",
            fix="choose another folder; results are never overwritten",
        )


def child_environment(hardware: str, num_threads: int | None = None) -> dict[str, str]:
    """Environment of the training processes; a `cpu` case sees no accelerator."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment["PYTHONUNBUFFERED"] = "1"
    if hardware == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Recorded attempts of a run directory; empty when it was not started by the launcher."""
    file = run_dir / ATTEMPTS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def classify_failure(
    *, exit_code: int, log: str, last_iteration: int, phase: str, timed_out: bool = False
) -> tuple[AttemptKind, str]:
    """Name the kind of an ended attempt, and its reason in one line."""
    if timed_out:
        return "timeout", "ran past its time budget"
    if exit_code == 0:
        return "completed", ""
    reason = failure_reason(log, exit_code)
    if last_iteration > 0 or phase not in ("", "startup"):
        return "result", reason
    ours = _OUR_ERRORS.search(log)
    if ours and not _is_infrastructure(f"{ours.group(1)}: {ours.group(2)}"):
        return "refused", reason
    exceptions = _exceptions(log)
    # SIGKILL without any exception is the kernel or the scheduler taking the processes away.
    killed = exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Signal 9 (SIGKILL)" in log
    if (killed and not exceptions) or (exceptions and all(map(_is_infrastructure, exceptions))):
        return "infra", reason
    return "result", reason


def failure_reason(log: str, exit_code: int) -> str:
    """In one line, why: our own error, else the first exception a worker printed, else the exit code."""
    ours = _OUR_ERRORS.search(log)
    if ours:
        rows = _ERROR_ROWS.match(log, ours.end())
        said = [
            ours.group(2),
            *(" ".join(row.split()) for row in (rows.group() if rows else "").splitlines() if row),
        ]
        return f"{ours.group(1)}: {'; '.join(said)}"
    exceptions = _exceptions(log)
    if exceptions:
        return exceptions[0]
    if exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _exceptions(log: str) -> list[str]:
    """Last lines of the tracebacks in a log. torchrun's own report of a failed child says nothing and is left out."""
    return [
        f"{match.group(1).rsplit('.', 1)[-1]}: {match.group(2) or ''}".rstrip(": ")
        for match in _EXCEPTION_LINE.finditer(log)
        if not match.group(1).endswith("ChildFailedError")
    ]


def _is_infrastructure(exception: str) -> bool:
    return any(re.search(pattern, exception) for pattern in _INFRA_PATTERNS)


def _one_attempt(
    command: list[str],
    run_dir: Path,
    number: int,
    environment: dict[str, str],
    watch: Watch,
    log_name: str,
) -> tuple[Attempt, KeyboardInterrupt | None]:
    started_at, start = datetime.now(UTC), time.monotonic()
    interrupt: KeyboardInterrupt | None = None
    timed_out = False
    with (run_dir / log_name).open("ab") as log, _terminate_as_interrupt():
        process = start_group(command, environment, log)
        try:
            timed_out = not _follow(process, run_dir, watch)
        except KeyboardInterrupt as error:
            interrupt = error
        finally:
            stop_group(process)
            _sweep(run_dir)
    text = _tail(run_dir / log_name)
    last_iteration, phase = _how_far(run_dir)
    kind, reason = classify_failure(
        exit_code=process.returncode,
        log=text,
        last_iteration=last_iteration,
        phase=phase,
        timed_out=timed_out,
    )
    if interrupt is not None:
        kind, reason = "interrupted", "interrupted"
    attempt = Attempt(
        number=number,
        started_at=started_at.isoformat(timespec="seconds"),
        duration_s=round(time.monotonic() - start, 3),
        exit_code=process.returncode,
        kind=kind,
        phase=phase,
        last_iteration=last_iteration,
        reason=reason,
        directory=".",
    )
    return attempt, interrupt


def start_group(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own that ends when this process does; it prints into `log`."""
    return subprocess.Popen(
        [sys.executable, str(TIED), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=REPOSITORY,
        start_new_session=True,
    )


def _follow(process: subprocess.Popen[bytes], run_dir: Path, watch: Watch) -> bool:
    """Wait for the process, reporting iterations. False when its time is over."""
    start = time.monotonic()
    reader = _MetricsTail(run_dir / METRICS_FILE)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.25)
        if watch.progress is not None:
            for metrics in reader.new_lines():
                watch.progress(int(metrics["iteration"]), metrics)
        if process.returncode is not None:
            return True
        if watch.cancel is not None and watch.cancel.is_set():
            raise KeyboardInterrupt
        if watch.time_budget_s is not None and time.monotonic() - start > watch.time_budget_s:
            return False


class _MetricsTail:
    """Reads the whole lines that were added to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if line.strip():
                    yield json.loads(line)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that a cancelled CI job also leaves a readable run."""

    def handler(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: two runs side by side; the main thread handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Stop the process and everything it started: politely, then by force.

    torchrun puts each worker in a session of its own, so the group alone does not reach them.
    """
    if process.poll() is not None:
        return
    import psutil

    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=GRACE_SECONDS)


def _sweep(run_dir: Path) -> None:
    """Kill what a launch left behind on this host: a killed rank cannot end the helpers that it had started."""
    import psutil

    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.environ().get(RUN_VARIABLE) == str(run_dir) and process.pid != os.getpid():
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=GRACE_SECONDS)


def _how_far(run_dir: Path) -> tuple[int, str]:
    """Last finished iteration and the phase, from what the run wrote."""
    last = 0
    for metrics in _MetricsTail(run_dir / METRICS_FILE).new_lines():
        last = int(metrics["iteration"])
    file = run_dir / RUN_FILE
    phase = ""
    if file.is_file():
        phase = str(json.loads(file.read_text(encoding="utf-8")).get("outcome", {}).get("phase", ""))
    return last, phase or ("training" if last else "startup")


def _set_aside(run_dir: Path, attempt: Attempt) -> Attempt:
    """Move the files of a failed attempt to `attempt-N/`, leaving the run directory free for the next."""
    folder = run_dir / f"attempt-{attempt.number}"
    folder.mkdir()
    for item in list(run_dir.iterdir()):
        if not item.name.startswith(("attempt-", SENTINEL_PREFIX)) and item.name != ATTEMPTS_FILE:
            shutil.move(item, folder / item.name)
    return Attempt(**{**asdict(attempt), "directory": folder.name})


def _write_attempts(run_dir: Path, attempts: list[Attempt]) -> None:
    text = json.dumps([asdict(item) for item in attempts], indent=1)
    write_whole(run_dir / ATTEMPTS_FILE, text + "\n")


def _tail(path: Path, limit: int = 2_000_000) -> str:
    """End of a log, at most `limit` bytes."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - limit))
        return stream.read().decode(errors="replace")
