# SPDX-License-Identifier: Apache-2.0
"""The hooks of public benchmarks, with packages of their names that write down how they were called."""

import json
from pathlib import Path

import pytest

from models.contract.architecture import FAMILIES
from models.conversion.tiny import write_tiny_checkpoint
from models.entry.generate import main
from models.generation.toolkits import LMMS_EVAL_MODELS, VLMEVALKIT_CLASSES

NOTE = "import json, sys; open('called.json', 'w').write(json.dumps(sys.argv[1:])); sys.exit(int('fail' in sys.argv))"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_tiny_checkpoint(folder / "tiny", "qwen3_vl", init="random")
    return folder


@pytest.fixture
def place(tmp_path: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with packages that look like the toolkits."""
    for file, text in {
        "site/lmms_eval/__init__.py": "", "site/lmms_eval/__main__.py": NOTE,
        "site/vlmeval/__init__.py": "", "site/run.py": NOTE,
    }.items():  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    (tmp_path / "site.toml").write_text(
        f'checkpoints = "{checkpoints}"\ndatasets = "{tmp_path}"\nscratch = "{tmp_path}"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path


def run(*arguments: str) -> int:
    try:
        return main(
            ["benchmark", "--checkpoint", "tiny", "--site", "site.toml", "--out", "results", *arguments]
        )
    except SystemExit as stop:  # how typer ends
        return int(stop.code or 0)


def test_lmms_eval_is_asked(place: Path, checkpoints: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--task", "ai2d", "--task", "mmmu_val") == 0
    assert json.loads((place / "called.json").read_text()) == [
        "--model", "qwen3_vl", "--model_args", f"pretrained={checkpoints / 'tiny'}", "--tasks", "ai2d,mmmu_val",
        "--batch_size", "1", "--output_path", str(place / "results"), "--log_samples",
    ]  # fmt: skip
    assert "-m lmms_eval --model qwen3_vl" in capfd.readouterr().out


def test_vlmevalkit_gets_a_config(place: Path, checkpoints: Path) -> None:
    assert run("--toolkit", "vlmevalkit", "--task", "MMBench_DEV_EN=ImageMCQDataset") == 0
    config = place / "results" / "vlmevalkit.json"
    called = json.loads((place / "called.json").read_text())
    assert called == ["--config", str(config), "--work-dir", str(place / "results")]
    assert json.loads(config.read_text()) == {
        "model": {"tiny": {"class": "Qwen3VLChat", "model_path": str(checkpoints / "tiny")}},
        "data": {"MMBench_DEV_EN": {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN"}},
    }


def test_what_cannot_run_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert run(*arguments) == 1
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "expected: NAME=CLASS" in refused("--toolkit", "vlmevalkit", "--task", "MMBench_DEV_EN")
    (place / "site" / "run.py").unlink()
    assert "run.py is not beside its package" in refused("--toolkit", "vlmevalkit", "--task", "A=B")
    assert not (place / "results").exists()
    assert "lmms-eval ended with exit code 1" in refused("--task", "fail")
    assert "output exists" in refused("--task", "ai2d")
    (place / "results").rmdir()
    monkeypatch.setattr("models.generation.toolkits.find_spec", lambda _: None)
    error = refused("--task", "ai2d")
    assert "lmms-eval is not installed" in error
    assert "pip install lmms-eval" in error


def test_dry_run_starts_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--task", "ai2d", "--dry-run") == 0
    assert not (place / "results").exists()
    assert "lmms_eval" in capfd.readouterr().out


def test_every_family_has_an_adapter() -> None:
    assert set(FAMILIES) == set(LMMS_EVAL_MODELS) > set(VLMEVALKIT_CLASSES)
