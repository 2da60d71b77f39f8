# SPDX-License-Identifier: Apache-2.0
"""Verbs about this machine and its cases: doctor, plan, run."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import typer

from harness.cases import SUITES, Case, cases_of_recipe, discover
from harness.devices import hardware_class
from harness.hardware import Probe, check_claim, environment_fingerprint, probe_host
from harness.nvml import opened_devices
from models.contract.cluster import ONE_NODE, Cluster, processes_per_node
from models.contract.errors import ConfigError
from models.contract.site import load_site


def session_options(
    *,
    run_root: Path | None = None,
    site_file: Path | None = None,
    baseline_dir: Path | None = None,
    gate_mode: Any = "tost",
    window: str | None = None,
    policy_file: Path | None = None,
    time_budget_s: float | None = None,
    sentinel_s: float | None = None,
    cluster: Cluster = ONE_NODE,
) -> Any:
    """Options of a session from what the command line said.

    Raises:
        ConfigError: several nodes without a folder that they share.
    """
    from harness.gates.window import parse_window
    from harness.session import BASELINES, SessionOptions, new_run_root

    if cluster.num_nodes > 1 and run_root is None:
        raise ConfigError(
            "several nodes need one folder for the runs", where="--run-root",
            expected="a folder on a disk that all nodes share, the same on each", got="the default, runs/TIME",
            fix="name it on every node",
        )  # fmt: skip
    return SessionOptions(
        run_root=(run_root or new_run_root()).absolute(),
        site=load_site(site_file),
        site_file=site_file,
        baseline_dir=baseline_dir or BASELINES,
        policy_file=policy_file,
        gate_mode=gate_mode,
        window=parse_window(window) if window is not None else None,
        time_budget_s=time_budget_s,
        sentinel_s=sentinel_s,
        cluster=cluster,
    )


def select(names: Iterable[str], hardware: str | None) -> list[Case]:
    """Cases by id, suite, case name or recipe file; all of them when none is named.

    Raises:
        ConfigError: a name fits no case, or nothing is left.
    """
    if hardware is not None:
        hardware_class(hardware)
    known = discover(SUITES)
    names = list(names)
    chosen: list[Case] = [] if names else known
    for name in names:
        if name.endswith(".toml"):
            found = cases_of_recipe(Path(name).absolute())
        else:
            found = [
                case
                for case in known
                if name in (case.id, case.suite, case.name, f"{case.suite}/{case.name}")
            ]
        if not found:
            raise ConfigError(
                f"no case '{name}'",
                expected=f"a case id, or one of the suites {', '.join(sorted({case.suite for case in known}))}",
                fix="`qwen-harness plan` lists every case",
            )
        chosen += found
    fitting = list({case.id: case for case in chosen if hardware in (None, case.hardware)}.values())
    if not fitting:
        raise ConfigError("no case is left", got=f"{len(chosen)} case(s), none of class {hardware}")
    return fitting


def plan(names: list[str], hardware: str | None, site_file: Path | None) -> None:
    """Print the plan.

    Raises:
        ConfigError: a recipe file or case that was named cannot run as it is.
    """
    from harness.plan import plan_case, plan_text, require_possible

    site = load_site(site_file)
    planned = [plan_case(case, site) for case in _planned(names, hardware)]
    typer.echo(plan_text(planned))
    if any(name.endswith(".toml") or "@" in name for name in names):
        require_possible(planned)


def _planned(names: list[str], hardware: str | None) -> list[Case]:
    """The selection; a recipe file is planned for the class that was asked for, whether it lists that class or not."""
    if hardware is not None:
        hardware_class(hardware)
    files = [name for name in names if name.endswith(".toml")]
    if hardware is None or not files:
        return select(names, hardware)
    cases = [replace(cases_of_recipe(Path(file).absolute())[0], hardware=hardware) for file in files]
    others = [name for name in names if name not in files]
    return [*cases, *(select(others, hardware) if others else [])]


def run(names: list[str], hardware: str | None, options: Any, *, jobs: int, report_dir: Path | None) -> int:
    """Train and judge; returns the worst verdict's exit code.

    Raises:
        EnvironmentMismatch: a case that was named needs another machine; without names or class it is left out.
        ConfigError: the first node has no address.
    """
    from harness.assets import ensure
    from harness.launch import look_for_first_node
    from harness.report.build import build_report
    from harness.report.view import decided_by
    from harness.session import REPORTS, run_case
    from harness.verdict import EXIT_CODES, worst

    probe = probe_host()
    cases = select(names, hardware)
    if names or hardware:
        for case in cases:
            here = processes_per_node(case.recipe.num_processes, options.cluster.num_nodes)
            check_claim(case.hardware, probe, num_devices=here)
    else:
        cases = [case for case in cases if probe.has(case.hardware)]
    look_for_first_node(options.cluster)
    ensure(cases, options.site)
    results = []
    with _Progress() as progress, ThreadPoolExecutor(max_workers=jobs) as pool:
        on_cpu = [case for case in cases if case.hardware == "cpu"] if jobs > 1 else []
        futures = [
            pool.submit(run_case, case, options, watch=progress.watch(case, options)) for case in on_cpu
        ]
        try:
            for case in cases:
                if case not in on_cpu:
                    results.append(run_case(case, options, watch=progress.watch(case, options)))
            results += [future.result() for future in futures]
        except KeyboardInterrupt:
            progress.cancel.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for result in results:
        typer.echo(f"{result.verdict.name:<14}{result.case.id}: {decided_by(result.verdict.gates)}")
    if options.cluster.node_rank == 0:
        typer.echo(
            f"report: {build_report([options.run_root], report_dir or REPORTS / options.run_root.name)}"
        )
    return EXIT_CODES[worst(result.verdict.name for result in results)]


def diverge(
    run_a: Path,
    run_b: Path,
    work: Path | None,
    *,
    steps: int,
    tolerance: float | None,
    site_file: Path | None,
) -> int:
    """Print where two runs part; 0 when they do not, 10 when they do."""
    from harness.diverge import diverge as find
    from harness.session import RUNS, new_run_root
    from harness.verdict import EXIT_CODES

    folder = work or RUNS / f"diverge-{new_run_root().name}"
    found = find(run_a, run_b, folder, steps=steps, tolerance=tolerance, site_file=site_file)
    typer.echo("\n".join(found.lines()))
    return EXIT_CODES["REGRESSION" if found.parts else "PASS"]


def smoke(run_root: Path | None, report_dir: Path | None, site_file: Path | None) -> int:
    """Run the smoke job; returns the worst verdict's exit code."""
    from harness.session import REPORTS
    from harness.smoke import TIME_BUDGET_S
    from harness.smoke import smoke as run_smoke

    start = time.monotonic()
    options = session_options(run_root=run_root, site_file=site_file, time_budget_s=TIME_BUDGET_S)
    code = run_smoke(options, report_dir or REPORTS / "smoke")
    typer.echo(f"{time.monotonic() - start:.0f} s, exit code {code}")
    return code


class _Progress:
    """One bar a case on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        import threading

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.cancel = threading.Event()
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def watch(self, case: Case, options: Any) -> Any:
        from harness.launch import Watch

        bar = self._bars.add_task(case.id, total=case.recipe.train.train_iters, loss="")

        def show(iteration: int, metrics: dict[str, Any]) -> None:
            self._bars.update(bar, completed=iteration, loss=f"lm_loss {float(metrics['lm_loss']):.4f}")

        return Watch(time_budget_s=options.time_budget_s, progress=show, cancel=self.cancel)


def doctor(site_file: Path | None, *, as_json: bool) -> int:
    """Print what this machine is; 0 when training can start here, 1 when something it needs is missing."""
    probe, site = probe_host(), load_site(site_file)
    problems = []
    if sys.version_info[:2] != (3, 12):
        problems.append(f"Python 3.12 is needed, this is {sys.version.split()[0]}")
    fingerprint = environment_fingerprint(probe)
    for package in ("torch", "megatron-core", "transformers", "megatron-energon"):
        if f"package.{package}" not in fingerprint:
            problems.append(f"{package} is not installed: `make setup`")
    if probe.kind != "cpu" and probe.hardware is None:
        problems.append(
            f"'{probe.device_name}' is no class of harness/devices.py: no markers, no utilisation"
        )
    remarks = list(_remarks(probe, fingerprint))
    folders = {name: _folder(Path(getattr(site, name))) for name in ("checkpoints", "datasets", "scratch")}
    if as_json:
        data = {
            "probe": probe.to_dict(),
            "fingerprint": fingerprint,
            "folders": folders,
            "problems": problems,
            "remarks": remarks,
        }
        typer.echo(json.dumps(data, indent=1))
        return 1 if problems else 0
    rows = {"host": probe.describe(), "class": probe.hardware or "unknown", **fingerprint, **folders}
    width = max(map(len, rows))
    typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items() if value))
    typer.echo("".join(f"remark: {text}\n" for text in remarks), nl=False)
    typer.echo("\n".join(f"problem: {text}" for text in problems) or "no problem found")
    return 1 if problems else 0


def _remarks(probe: Probe, fingerprint: dict[str, str]) -> Iterator[str]:
    """What does not keep training from starting, and makes it slow or its times worthless."""
    if probe.kind != "cuda":
        return
    if "package.transformer-engine" not in fingerprint:
        yield "transformer-engine is not installed: torch's kernels take over, slower (pip install -e '.[gpu]')"
    with opened_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), probe.device_count) as devices:
        for facts in (device.facts() for device in devices):
            where = f"device {facts['index']}"
            if facts["processes_before"]:
                yield f"{where} is in use by {facts['processes_before']} process(es): times would be INVALID"
            limit, default = facts["power_limit_w"], facts["default_power_limit_w"]
            if limit and default and limit < default:
                yield f"{where} is limited to {limit:.0f} of {default:.0f} W"


def _folder(path: Path) -> str:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free / 2**30
    return f"{path} ({'there' if path.exists() else 'will be created'}, {free:.0f} GiB free)"
