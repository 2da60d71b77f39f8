# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: options, markers from the case matrix, fixtures, exit codes. Only this module knows pytest.

It is loaded into every pytest session, so it imports nothing heavy and does nothing unless a test asks for the `case`
fixture in a folder that holds recipes.

A case runs only where the probe finds its hardware. A case that was asked for by its hardware marker (``-m h20``) or by
``--hw`` on another machine ends the session with ENV_MISMATCH, exit code 14; cases of other machines that were not
asked for by name are deselected.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.mark.expression import Expression

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.cases import Case
    from harness.session import CaseResult, SessionOptions
    from harness.verdict import VerdictName

ENV_MISMATCH_EXIT = 14
TESTS_FILE = "tests.jsonl"


@dataclass
class State:
    """What one session knows; None of it exists for a session without cases."""

    options: SessionOptions
    jobs: int
    repeats: int
    calibration_runs: int
    missing_baseline: str
    require_hw: bool
    report_dir: Path
    results: list[CaseResult] = field(default_factory=list)
    tolerated: set[int] = field(default_factory=set)
    """Ids of results whose missing baseline was asked to be skipped."""
    futures: dict[str, Future[list[CaseResult]]] = field(default_factory=dict)
    cancel: threading.Event = field(default_factory=threading.Event)
    pool: ThreadPoolExecutor | None = None
    report_file: Path | None = None


STATE: pytest.StashKey[State] = pytest.StashKey()
MISMATCH: pytest.StashKey[str] = pytest.StashKey()
REPORT_LOG: pytest.StashKey[Any] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the harness; what each does is in its help text."""
    in_ci = bool(os.environ.get("CI"))
    group = parser.getgroup("qwen-harness")
    group.addoption(
        "--hw", default="auto", metavar="CLASS", help="class this host claims to be; `auto` probes"
    )
    group.addoption(
        "--require-hw",
        action=argparse.BooleanOptionalAction,
        default=in_ci,
        help="a missing baseline may not be skipped on the requested hardware (default when CI is set)",
    )
    group.addoption(
        "--baseline-dir", type=Path, metavar="DIR", help="baselines to compare with (default: baselines/)"
    )
    group.addoption(
        "--missing-baseline",
        choices=("fail", "record", "skip"),
        default="fail" if in_ci else "record",
        help="a case without baseline: fail; write a candidate that is not in force; or skip",
    )
    group.addoption(
        "--gate",
        choices=("tost", "literal", "off"),
        default="tost",
        help="what decides about the loss: the end window's equivalence test, the single last point, or nothing",
    )
    group.addoption(
        "--window",
        metavar="FIRST:LAST",
        help="iterations of the end-window test, or how many of the last (default: the policy's last 50)",
    )
    group.addoption(
        "--repeats", type=int, default=1, metavar="N", help="launches of each case; all are judged"
    )
    group.addoption(
        "--aa", type=int, default=0, metavar="N", help="further launches of each case, kept to calibrate"
    )
    group.addoption("--from-logs", type=Path, metavar="PATH", help="judge these logs or runs; start nothing")
    group.addoption(
        "--plan", action="store_true", help="print cases, commands, device-hours and disk, then stop"
    )
    group.addoption("--time-budget", type=float, metavar="SECONDS", help="stop a launch that takes longer")
    group.addoption(
        "--sentinel",
        type=_seconds,
        metavar="SECONDS",
        help="measure the machine this long before and after each run (default: 10 on accelerators; 0: never)",
    )
    group.addoption("--jobs", type=int, default=1, metavar="N", help="CPU cases that train side by side")
    group.addoption(
        "--run-root", type=Path, metavar="DIR", help="folder of the run directories (default: runs/<time>)"
    )
    group.addoption(
        "--report-dir", type=Path, metavar="DIR", help="folder of the report (default: reports/<time>)"
    )
    group.addoption(
        "--site", type=Path, metavar="FILE", help="site file (default: $QWEN_HARNESS_SITE, site.toml)"
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text}")
    return value


def pytest_configure(config: pytest.Config) -> None:
    """Register every marker the case matrix can add, so that ``--strict-markers`` knows them."""
    from harness.devices import HARDWARE
    from models.contract.architecture import FAMILIES

    for row in HARDWARE.values():
        config.addinivalue_line("markers", f"{row.name}: case for {row.title}; the probe must find it")
    for family in FAMILIES:
        config.addinivalue_line("markers", f"{family}: case of this family")
    for name in ("gpu1", "gpu2", "gpu4", "gpu8", "gpu16", "gpu32", "gpu64"):
        config.addinivalue_line("markers", f"{name}: case that needs this many devices")
    config.addinivalue_line("markers", "smoke: the shortest cases of a suite")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `case` the cases of the recipes beside it.

    A module may narrow them with a function ``select_case(case) -> bool``.
    """
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.definition.path.parent
    if not any(folder.glob("*.toml")):
        return
    from harness.cases import cases_of_folder
    from models.contract.errors import HarnessError

    try:
        cases = cases_of_folder(folder)
    except HarnessError as error:
        raise pytest.Collector.CollectError(_with_notes(error)) from None
    wanted = getattr(metafunc.module, "select_case", None)
    cases = [case for case in cases if wanted is None or wanted(case)]
    for case in cases:
        for marker in case.markers:
            metafunc.config.addinivalue_line("markers", f"{marker}: from the case matrix")
    metafunc.parametrize(
        "case",
        [
            pytest.param(
                case, id=f"{case.name}@{case.hardware}", marks=[getattr(pytest.mark, m) for m in case.markers]
            )
            for case in cases
        ],
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Compare what was asked for with what this host is; drop cases of other machines."""
    expression = str(config.option.markexpr or "")
    claimed = str(config.getoption("--hw"))
    wanted = _named_hardware(expression) | ({claimed} - {"auto"})
    if not wanted and not any(_case_of(item) for item in items):
        return
    if config.option.plan or config.option.from_logs:
        return
    message = _mismatch(wanted, [case for item in items if (case := _case_of(item))])
    if message:
        config.stash[MISMATCH] = message
        return
    keep, drop = [], []
    for item in items:
        case = _case_of(item)
        (keep if case is None or _runs_here(case, claimed) else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


def pytest_collection_finish(session: pytest.Session) -> None:
    """Open the session when there are cases: folders, the log of test reports."""
    config = session.config
    if MISMATCH in config.stash or config.option.plan or config.option.collectonly:
        return
    if not any(_case_of(item) or "artifacts" in _fixtures_of(item) for item in session.items):
        return
    state = config.stash[STATE] = _open_state(config)
    state.options.run_root.mkdir(parents=True, exist_ok=True)
    if not config.option.report_log:
        # a session that is killed leaves its finished tests here, where `qwen-harness report` finds them
        from pytest_reportlog.plugin import ReportLogPlugin

        log = ReportLogPlugin(config, state.options.run_root / TESTS_FILE)
        config.stash[REPORT_LOG] = log
        config.pluginmanager.register(log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Stop before the first test for a mismatch or a plan."""
    config = session.config
    if session.testsfailed:
        return None
    if MISMATCH in config.stash:
        for item in session.items:
            if _case_of(item):
                _report_error(config, item, config.stash[MISMATCH])
        return True
    if config.option.plan:
        from harness.plan import plan_case, plan_text

        cases = [case for item in session.items if (case := _case_of(item))]
        planned = [plan_case(case, _site(config)) for case in _unique(cases)]
        config.get_terminal_writer().write("\n" + plan_text(planned) + "\n")
        return True
    return None


@pytest.fixture
def case_result(case: Case, request: pytest.FixtureRequest) -> CaseResult:
    """The case, launched and judged; of several launches the one with the worst verdict.

    A run that never trained, or that is from another machine, is an error of the test, not a failure.
    """
    from harness.verdict import worst

    state = request.config.stash[STATE]
    results = _results(state, case, request)
    name = worst([result.verdict.name for result in results])
    result = next(result for result in results if result.verdict.name == name)
    _describe(request.node, result)
    if name in ("ENV_MISMATCH", "INFRA_ERROR"):
        pytest.fail(verdict_text(result), pytrace=False)
    return result


@pytest.fixture
def results_of(request: pytest.FixtureRequest) -> Callable[[Case], list[CaseResult]]:
    """Launches and judges another case of the session, at most once, for tests that compare two."""
    state = request.config.stash[STATE]
    return lambda other: _results(state, other, request)


@pytest.fixture
def sound_run(case: Case, request: pytest.FixtureRequest) -> CaseResult:
    """The case, launched and judged on soundness alone: whole, finite, possible. No baseline is asked for."""
    result = _results(request.config.stash[STATE], case, request)[0]
    _describe(request.node, result)
    return result


@pytest.fixture
def settle(request: pytest.FixtureRequest) -> Callable[[CaseResult], None]:
    """Turns a verdict into the outcome of the test."""
    state = request.config.stash[STATE]

    def settle_result(result: CaseResult) -> None:
        name = result.verdict.name
        if name in ("PASS", "PASS_IMPROVED"):
            return
        text = verdict_text(result)
        if name == "INCONCLUSIVE" and not os.environ.get("CI"):
            pytest.xfail(text)
        if name == "NO_BASELINE" and state.missing_baseline == "skip" and not state.require_hw:
            state.tolerated.add(id(result))
            pytest.skip(text)
        if name == "NO_BASELINE" and state.missing_baseline == "record":
            from harness.session import record_candidate

            pytest.xfail(f"{text}\n  candidate written to {record_candidate(result, state.options)}")
        pytest.fail(text, pytrace=False)

    return settle_result


@pytest.fixture
def artifacts(request: pytest.FixtureRequest) -> Path:
    """Folder for what a test leaves for the report (conversion.json, samples.json); also opens a session."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in request.node.name)
    folder = request.config.stash[STATE].options.run_root / request.path.parent.name / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def session_options(request: pytest.FixtureRequest) -> SessionOptions:
    """What is the same for every case of the session: site, folders, threads."""
    return request.config.stash[STATE].options


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Print an error of ours as its own text, without a traceback, in tests of cases."""
    report = yield
    if call.excinfo is not None and _case_of(item) is not None:
        from models.contract.errors import HarnessError

        if isinstance(call.excinfo.value, HarnessError):
            report.longrepr = _with_notes(call.excinfo.value)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Stop what still runs, build the report, and set the verdict's exit code."""
    config = session.config
    if MISMATCH in config.stash:
        session.exitstatus = ENV_MISMATCH_EXIT
        return
    if config.option.plan and exitstatus == pytest.ExitCode.OK:
        return
    state = config.stash.get(STATE, None)
    if state is None:
        return
    state.cancel.set()
    if state.pool is not None:
        state.pool.shutdown(wait=True, cancel_futures=True)
    _build_report(state)
    names: list[VerdictName] = [
        result.verdict.name for result in state.results if id(result) not in state.tolerated
    ]
    if names and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        from harness.verdict import EXIT_CODES, worst

        session.exitstatus = EXIT_CODES[worst(names)] or exitstatus


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the log of test reports."""
    if REPORT_LOG in config.stash:
        log = config.stash[REPORT_LOG]
        config.pluginmanager.unregister(log)
        log.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line a verdict, and where the report is."""
    if MISMATCH in config.stash:
        terminalreporter.write_line(f"ENV_MISMATCH: {config.stash[MISMATCH]}", red=True)
        return
    state = config.stash.get(STATE, None)
    if state is None or not state.results:
        return
    from harness.report.view import decided_by

    terminalreporter.section("verdicts")
    for result in state.results:
        retried = f" (started {result.retried + 1} times)" if result.retried else ""
        name = result.verdict.name
        color = {"green": True} if name.startswith("PASS") else {"red": True}
        terminalreporter.write(f"{name:<14}", **color)
        terminalreporter.write_line(f"{result.case.id}{retried}: {decided_by(result.verdict.gates)}")
    if state.report_file:
        terminalreporter.write_line(f"report: {state.report_file}")


def verdict_text(result: CaseResult) -> str:
    """Verdict and the findings behind it, a line each."""
    verdict = result.verdict
    lines = [f"{verdict.name}: {result.case.id} (run {result.run_dir})"]
    lines += [
        f"  {gate.gate:<12}{gate.status:<13}{gate.summary}" for gate in verdict.gates if gate.status != "pass"
    ]
    return "\n".join([*lines, *(f"  {note}" for note in verdict.notes)])


def _open_state(config: pytest.Config) -> State:
    from harness.session import BASELINES, REPORTS, SessionOptions, new_run_root

    option = config.option
    run_root = (option.run_root or new_run_root()).absolute()
    options = SessionOptions(
        run_root=run_root,
        site=_site(config),
        site_file=option.site,
        baseline_dir=option.baseline_dir or BASELINES,
        gate_mode=option.gate,
        window=_window(option.window),
        time_budget_s=option.time_budget,
        sentinel_s=option.sentinel,
        from_logs=option.from_logs,
    )
    return State(
        options=options,
        jobs=option.jobs,
        repeats=option.repeats,
        calibration_runs=option.aa,
        missing_baseline=option.missing_baseline,
        require_hw=option.require_hw,
        report_dir=option.report_dir or REPORTS / run_root.name,
    )


def _window(text: str | None) -> tuple[int, int] | None:
    from harness.gates.window import parse_window
    from models.contract.errors import HarnessError

    try:
        return parse_window(text) if text else None
    except HarnessError as error:
        raise pytest.UsageError(_with_notes(error)) from None


def _site(config: pytest.Config) -> Any:
    from models.contract.errors import HarnessError
    from models.contract.site import load_site

    try:
        return load_site(config.option.site)
    except HarnessError as error:
        raise pytest.UsageError(_with_notes(error)) from None


def _results(state: State, case: Case, request: pytest.FixtureRequest) -> list[CaseResult]:
    """Results of a case, launched at most once a session; CPU cases side by side when asked for."""
    side_by_side = state.jobs > 1 and case.hardware == "cpu" and state.options.from_logs is None
    if case.id not in state.futures and side_by_side:
        _submit_all(state, request.session.items)
    if case.id not in state.futures:
        future: Future[list[CaseResult]] = Future()
        state.futures[case.id] = future
        try:
            graded = _is_graded(case, request.session.items)
            future.set_result(_launch(state, case, _progress_line(request.config, case), graded))
        except BaseException as error:
            future.set_exception(error)
            raise
    try:
        results = state.futures[case.id].result()
    except KeyboardInterrupt:
        state.cancel.set()
        raise
    known = {id(result) for result in state.results}
    state.results += [result for result in results if id(result) not in known]
    return results


def _submit_all(state: State, items: list[pytest.Item]) -> None:
    state.pool = state.pool or ThreadPoolExecutor(max_workers=state.jobs)
    launching = {"case_result", "sound_run"}
    wanted = [case for item in items if launching & _fixtures_of(item) and (case := _case_of(item))]
    for case in _unique(wanted):
        if case.hardware == "cpu" and case.id not in state.futures:
            graded = _is_graded(case, items)
            state.futures[case.id] = state.pool.submit(_launch, state, case, None, graded)


def _is_graded(case: Case, items: list[pytest.Item]) -> bool:
    """Whether some test of the session wants the case compared with a baseline."""
    return any(
        "case_result" in _fixtures_of(item) and (found := _case_of(item)) and found.id == case.id
        for item in items
    )


def _launch(state: State, case: Case, progress: Any, is_graded: bool) -> list[CaseResult]:
    from harness.launch import Watch
    from harness.session import run_case

    watch = Watch(time_budget_s=state.options.time_budget_s, progress=progress, cancel=state.cancel)
    judged = [
        run_case(case, state.options, number=number, watch=watch, use_baseline=is_graded)
        for number in range(1, state.repeats + 1)
    ]
    for number in range(state.repeats + 1, state.repeats + state.calibration_runs + 1):
        run_case(case, state.options, number=number, watch=watch, use_baseline=False)
    return judged


def _progress_line(config: pytest.Config, case: Case) -> Callable[[int, dict[str, Any]], None] | None:
    if not sys.__stdout__ or not sys.__stdout__.isatty():
        return None
    writer, total = config.get_terminal_writer(), case.recipe.train.train_iters

    def show(iteration: int, metrics: dict[str, Any]) -> None:
        end = "\n" if iteration == total else ""
        writer.write(f"\r  {case.id}: {iteration}/{total}, lm_loss {float(metrics['lm_loss']):.4f} {end}")
        writer.flush()

    return show


def _build_report(state: State) -> None:
    from harness.report.build import build_report
    from harness.report.ci import announce
    from models.contract.errors import RunError

    try:
        state.report_file = build_report([state.options.run_root], state.report_dir)
    except RunError as error:
        if not any(state.options.run_root.rglob("run.json")):
            return  # every test stopped before anything ran: there is nothing to report
        raise error.with_note("while building the report") from None
    announce(state.report_dir, [(result.case.id, result.verdict) for result in state.results])


def _describe(node: pytest.Item, result: CaseResult) -> None:
    """Put every number into the JUnit properties."""
    verdict = result.verdict
    rows: list[tuple[str, object]] = [
        ("verdict", verdict.name),
        ("baseline_id", verdict.baseline_id or ""),
        ("match_level", verdict.match_level),
        ("run_dir", str(result.run_dir)),
        ("retried", result.retried),
    ]
    for gate in verdict.gates:
        rows.append((f"{gate.gate}.status", gate.status))
        rows += [(f"{gate.gate}.effect", gate.effect)] if gate.effect is not None else []
        rows += [(f"{gate.gate}.interval", list(gate.interval))] if gate.interval else []
    node.user_properties.extend(rows)


def _report_error(config: pytest.Config, item: pytest.Item, message: str) -> None:
    """Tell JUnit and the report log that the test erred; the terminal gets its one line at the end."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    tell = config.pluginmanager.subset_hook_caller("pytest_runtest_logreport", [terminal] if terminal else [])
    place = {"nodeid": item.nodeid, "location": item.location, "keywords": {}}
    text = f"ENV_MISMATCH: {message}"
    tell(report=pytest.TestReport(**place, outcome="failed", longrepr=text, when="setup"))
    tell(report=pytest.TestReport(**place, outcome="passed", longrepr=None, when="teardown"))


def _mismatch(wanted: set[str], cases: list[Case]) -> str:
    """Why this host cannot run what was asked for by name; empty when it can."""
    from harness.hardware import check_claim, probe_host
    from models.contract.errors import ConfigError, EnvironmentMismatch

    probe = probe_host()
    for name in sorted(wanted):
        devices = [case.recipe.num_processes for case in cases if case.hardware == name]
        try:
            check_claim(name, probe, num_devices=max(devices, default=1))
        except EnvironmentMismatch as error:
            return f"{error.what}: expected {error.expected}, got {error.got}; {error.fix}"
        except ConfigError as error:
            raise pytest.UsageError(str(error)) from None
    return ""


def _runs_here(case: Case, claimed: str) -> bool:
    from harness.hardware import probe_host

    return case.hardware == claimed if claimed != "auto" else probe_host().has(case.hardware)


def _named_hardware(expression: str) -> set[str]:
    """Hardware classes that a ``-m`` expression asks for: it holds with their marker and not without."""
    if not expression:
        return set()
    from harness.devices import HARDWARE

    compiled = Expression.compile(expression)
    words = set(expression.replace("(", " ").replace(")", " ").split())
    others = words - set(HARDWARE)

    def holds(names: set[str]) -> bool:
        return compiled.evaluate(lambda name, /, **_: name in names)

    # With every other marker present or none: `h20 and smoke` asks for h20 just as `h20` does, `not h20` does not.
    return {
        name
        for name in words & set(HARDWARE)
        if any(holds({name} | rest) and not holds(rest) for rest in (set(), others))
    }


def _case_of(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("case") if callspec else None
    return found if type(found).__name__ == "Case" and type(found).__module__ == "harness.cases" else None


def _fixtures_of(item: pytest.Item) -> set[str]:
    return set(item.fixturenames) if isinstance(item, pytest.Function) else set()


def _unique(cases: list[Case]) -> list[Case]:
    return list({case.id: case for case in cases}.values())


def _with_notes(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])
