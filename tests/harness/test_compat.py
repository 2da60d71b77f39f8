# SPDX-License-Identifier: Apache-2.0
"""Other projects' commands through the real program: the native command is printed, and does the work."""

import filecmp
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import HARNESS_ERROR_EXIT, main
from harness.hardware import REPOSITORY
from models.contract.compat_convert import RUN_ARGUMENTS

PROGRAM = [sys.executable, "-W", "ignore", "-c", "from harness.cli import main; main()"]


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("call", "native"),
    [
        (
            "run_8xH20 A3B /hf '/a b' false true fp16 --print",
            "qwen-harness convert hf-to-megatron /hf '/a b' --dtype fp16",
        ),
        (
            "run_8xH20 --print 8B /mcore /out true false bf16 /hf",
            "qwen-harness convert megatron-to-hf /mcore /out --hf /hf --dtype bf16",
        ),
        (
            "mm-convert Qwen3VLConverter hf_to_dcp --hf_dir h --dcp_dir=d --tie_weight True --print",
            "qwen-harness convert hf-to-dcp h d --style 2025 --tie-weight",
        ),
    ],
)
def test_compat_prints_the_native_command(call: str, native: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli("compat", *shlex.split(call), capsys=capsys)
    assert (code, out.strip()) == (0, native)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("run_8xH20", " ".join(RUN_ARGUMENTS)),
        ("run_8xH20 8B /a /b true true bf16", "HF_DIR"),
        ("mm-convert Qwen3VLConverter hf_to_dcp --hf_dri h", "--hf_dri"),
        ("mm-convert moe_expert --style merge", "unknown converter"),
    ],
)
def test_compat_refuses_in_one_message(call: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli("compat", *call.split(), capsys=capsys)
    assert (code, out) == (HARNESS_ERROR_EXIT, "")
    assert err.count("ConfigError") == 1
    assert words in err


@pytest.mark.slow
def test_compat_really_converts_at_every_precision(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    made = run_program(
        "convert", "tiny", str(source), "--family", "qwen3_vl", "--init", "random", "--dtype", "bf16"
    )
    assert made.returncode == 0, made.stderr
    sizes = {}
    for dtype in ("bf16", "fp16", "fp32"):
        there = ["8B", str(source), str(tmp_path / f"m-{dtype}"), "false", "true", dtype]
        back = ["8B", str(tmp_path / f"m-{dtype}"), str(tmp_path / dtype), "true", "true", dtype, str(source)]
        for call in (there, back):
            done = run_program("compat", "run_8xH20", *call)
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("qwen-harness convert ")
        sizes[dtype] = sum(file.stat().st_size for file in (tmp_path / dtype).glob("*.safetensors"))
    assert sizes["fp32"] > 1.8 * sizes["bf16"]
    names = [file.name for file in source.iterdir()]
    assert filecmp.cmpfiles(source, tmp_path / "bf16", names, shallow=False)[1:] == ([], [])
    assert filecmp.cmpfiles(source, tmp_path / "fp16", names, shallow=False)[1]
    dcp = ["--hf_dir", str(source), "--dcp_dir", str(tmp_path / "dcp")]
    assert run_program("compat", "mm-convert", "Qwen3VLConverter", "hf_to_dcp", *dcp).returncode == 0
    back = ["--load_dir", str(tmp_path / "dcp"), "--save_dir", str(tmp_path / "again")]
    done = run_program(
        "compat", "mm-convert", "Qwen3VLConverter", "dcp_to_hf", *back, "--model_assets_dir", str(source)
    )
    assert done.returncode == 0, done.stderr
    assert filecmp.cmpfiles(source, tmp_path / "again", names, shallow=False)[1:] == ([], [])
