# SPDX-License-Identifier: Apache-2.0
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from harness.cli import HARNESS_ERROR_EXIT, main
from harness.cli.app import app
from harness.hardware import REPOSITORY
from harness.records import RunRecord
from models.contract import waiting
from models.contract.compat_train import WITHOUT_ARGUMENTS, script_recipe
from models.contract.recipe import load_recipe
from suites.detection.synthetic import Row, SyntheticRun, write_synthetic_run

LOG_LINE = (
    " [2025-10-24 09:54:09] iteration      500/     500 | consumed samples:        32000 | "
    "elapsed time per iteration (ms): 5622.0 | throughput per GPU (TFLOP/s/GPU): 552.0 | "
    "learning rate: 1.000000E-06 | global batch size:    64 | lm loss: {loss} | loss scale: 1.0 | "
    "grad norm: 11.199 | tokens/sec/gpu: 11657.0 | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |\n"
)
OPTIONS = {
    "doctor": ["--json", "--site"],
    "plan": ["--hardware", "--hw", "--site"],
    "run": [
        "--baseline-dir", "--gate", "--hardware", "--hosts", "--hw", "--jobs", "--output", "--run-root", "--scheduler",
        "--sentinel",
        "--site", "--this-host", "--time-budget", "--window", "-o",
    ],
    "grade": [
        "--baseline", "--baseline-dir", "--from-log", "--gate", "--hw", "--json", "--no-write", "--policy", "--window",
        "--write",
    ],
    "compare": ["--gate", "--json", "--policy", "--window"],
    "diverge": ["--site", "--steps", "--tolerance", "--work"],
    "report": ["--output", "--title", "-o"],
    "smoke": ["--output", "--run-root", "--site", "-o"],
    "convert": [],
    "data": [],
    "generate": [],
    "baseline propose": ["--author", "--baseline-dir", "--because", "--case", "--policy", "--reason", "--report-only"],
    "baseline diff": [],
    "baseline accept": ["--baseline-dir", "--policy"],
    "baseline lint": ["--baseline-dir", "--policy"],
    "baseline show": [],
    "baseline retire": ["--baseline-dir", "--because"],
    "compat run_8xH20": ["--print"],
    "compat mm-convert": ["--print"],
    "compat run_mcore_qwen": ["--num-processes"],
    "compat run_mcore_qwen3_vl_lite": [],
    "compat run_mcore_qwen3_omni": [],
    "compat debug_mcore_qwen3_vl": [],
    "compat debug_mcore_qwen3_omni": [],
    "compat pretrain_transformers": ["--num-processes"],
}  # fmt: skip

PUBLISHED_CALL = [
    "dsw", "7B", "1", "64", "1e-5", "1e-6", "8192", "8192", "bf16", "1", "1", "1", "true", "true", "false", "false",
    "false", "100000", "wds", "wds", "ckpt", "500", "100", "out",
]  # fmt: skip


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def found_options() -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    root = get_command(app)
    for name, command in root.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        for verb, leaf in getattr(command, "commands", {"": command}).items():
            flags = [
                flag
                for parameter in leaf.params
                for flag in (*parameter.opts, *parameter.secondary_opts)
                if flag.startswith("-")
            ]
            rows[f"{name} {verb}".strip()] = sorted(flags)
    return rows


def test_options_are_frozen() -> None:
    # A new option is a decision: it selects or limits, it never edits a recipe value. Write it down here.
    assert found_options() == OPTIONS


def test_every_verb_shows_an_example() -> None:
    root = get_command(app)
    for name, command in root.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        for verb, leaf in getattr(command, "commands", {"": command}).items():
            assert "qwen-harness" in (leaf.help or ""), f"{name} {verb}"


@pytest.mark.parametrize(("loss", "code"), [("1.596570E+00", 0), ("1.700000E+00", 10), ("nan", 11)])
def test_grade_from_log_exits_with_the_verdict(
    loss: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG_LINE.format(loss=loss))
    found, out, _ = run_cli("grade", "--from-log", str(log), "--gate", "literal", capsys=capsys)
    assert found == code, out
    assert f"exit code {code}" in out


def test_grade_writes_the_verdict_beside_a_run(
    launches: list[RunRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(launches[0].source)
    code, out, _ = run_cli("grade", str(run), "--json", "--baseline-dir", str(run / "none"), capsys=capsys)
    assert code == 13
    assert json.loads(out)["name"] == "NO_BASELINE"
    assert json.loads((run / "verdict.json").read_text())["name"] == "NO_BASELINE"


def test_grade_with_another_hardware_is_a_mismatch(
    launches: list[RunRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--hw", "h20", "--no-write", "--baseline-dir", str(tmp_path))
    assert run_cli("grade", launches[0].source, *options, capsys=capsys)[0] == 14


def test_compare_tells_equal_from_worse(
    launches: list[RunRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def worse(rows: list[Row]) -> list[Row]:
        return [{**row, "lm_loss": row["lm_loss"] * 1.1} for row in rows]

    bad = write_synthetic_run(tmp_path / "bad", SyntheticRun(run_seed=7), change_rows=worse)
    assert run_cli("compare", launches[0].source, launches[1].source, capsys=capsys)[0] == 0
    assert run_cli("compare", str(bad), launches[1].source, capsys=capsys)[0] == 10


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["grade"], "one thing to grade is needed"),
        (["grade", "/nowhere/at/all"], "no such run or log"),
        (["report", "/nowhere/at/all"], "path does not exist"),
        (["plan", "no-such-case"], "no case 'no-such-case'"),
        (["plan", "--hw", "h2o"], "unknown hardware class 'h2o'"),
        (["compat", "run_mcore_qwen", "dsw", "7B"], "wrong number of arguments for run_mcore_qwen"),
        (
            ["compat", "run_mcore_qwen", *PUBLISHED_CALL[:9], "two", *PUBLISHED_CALL[10:]],
            "argument TP is not",
        ),
        (["compat", "debug_mcore_qwen3_vl", "dsw"], "takes no arguments"),
        (["baseline", "show", "/nowhere.json"], "no such baseline"),
    ],
)
def test_bad_input_prints_five_lines_and_no_traceback(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(*arguments, capsys=capsys)
    assert code == HARNESS_ERROR_EXIT
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 5


def test_compat_prints_the_recipe_of_a_script_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_cli("compat", "run_mcore_qwen", *PUBLISHED_CALL, capsys=capsys)
    assert code == 0
    (tmp_path / "recipe.toml").write_text(out)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert (recipe.data.seq_length, recipe.train.global_batch_size, recipe.num_processes) == (8192, 64, 8)
    assert recipe == script_recipe("run_mcore_qwen.sh", PUBLISHED_CALL)


def test_compat_takes_the_number_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_cli("compat", "run_mcore_qwen", "--num-processes", "16", *PUBLISHED_CALL, capsys=capsys)
    assert "num_processes = 16" in out


@pytest.mark.parametrize("script", WITHOUT_ARGUMENTS)
def test_compat_prints_the_recipe_of_scripts_without_arguments(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_cli("compat", script, capsys=capsys)
    assert code == 0
    (tmp_path / "recipe.toml").write_text(out)
    assert load_recipe(tmp_path / "recipe.toml") == script_recipe(script, [])


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("grade", "--no-such-option", capsys=capsys)[0] == 2


def test_run_refuses_a_case_of_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_cli("run", "convergence", "--hw", "h20", capsys=capsys)
    assert code == 14
    assert "h20 was asked for" in err


def test_run_refuses_a_first_node_without_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(waiting, "LOOKUP_S", 0.0)
    recipe = (REPOSITORY / "suites" / "cross_engine" / "tiny_qwen3_vl.toml").read_text()
    text = recipe.replace("micro_batch_size = 8", "micro_batch_size = 4", 1)
    (tmp_path / "r.toml").write_text("num_processes = 2\n" + text)
    nodes = ["--scheduler", "hosts", "--hosts", "gpu07,gpu08", "--this-host", "gpu08"]
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "r.toml"), "--hw", "cpu", *nodes, "--run-root", str(tmp_path / "runs")])
    assert stop.value.code == HARNESS_ERROR_EXIT
    assert "--hosts has no address" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_plan_lists_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli("plan", "convergence", "--hw", "h20", capsys=capsys)
    assert code == 0
    assert "convergence/qwen2_5_vl_7b_llava_pretrain@h20" in out
    assert "device-hours" in out


def test_plan_of_a_recipe_that_does_not_fit_exits_with_the_smallest_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(REPOSITORY / "suites" / "convergence" / "qwen2_5_vl_7b_llava_pretrain.toml")
    code, out, err = run_cli("plan", recipe, "--hardware", "a100", capsys=capsys)  # a class it does not list
    assert code == HARNESS_ERROR_EXIT
    assert "does not fit" in out
    assert "smallest change that fits" in err
    assert run_cli("plan", recipe, "--hw", "h200", capsys=capsys)[0] == 0


def test_report_is_built_from_run_directories(
    launches: list[RunRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_cli("report", launches[1].source, "-o", str(tmp_path / "out"), capsys=capsys)
    assert code == 0
    assert out.strip() == str(tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.zh-CN.html").is_file()


def test_handed_over_verbs_keep_arguments_and_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "synth", "--no-such-option"])
    assert stop.value.code == 2
    assert "--no-such-option" in capfd.readouterr().err


def test_importing_the_harness_loads_nothing_heavy() -> None:
    program = (
        "import sys, harness.cli.app, harness.session, harness.plugin\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'jinja2', 'matplotlib', 'statsmodels', 'arch'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
