# SPDX-License-Identifier: Apache-2.0
"""The program itself, in this process: output, files, one line for each bad input."""

import json
from pathlib import Path

import pytest

from models.contract.errors import DataError
from models.contract.evaluation import read_evaluation
from models.conversion.tiny import write_tiny_checkpoint
from models.datasets.prepare.job import write_dataset
from models.datasets.prepare.synthetic import ConvertScene
from models.entry.generate import main, one_line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_tiny_checkpoint(folder / "tiny", "qwen3_vl", init="random")
    splits = {split: [(split, index) for index in range(4)] for split in ("train", "val")}
    write_dataset(folder / "scenes", splits, ConvertScene("scenes", 0), about={}, shard_size=4)
    write_dataset(folder / "other", splits, ConvertScene("scenes", 1), about={}, shard_size=4)
    from PIL import Image

    Image.new("RGB", (84, 56), "red").save(folder / "red.png")
    (folder / "bad.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return folder


def run(*arguments: str | Path) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # how typer ends
        return int(stop.code or 0)


def test_answer_prints_and_writes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = place / "red.png", tmp_path / "said.jsonl"
    asked = (
        "--checkpoint",
        place / "tiny",
        "--image",
        image,
        "--image",
        image,
        "--each",
        "--max-new-tokens",
        "4",
    )
    assert run(*asked, "--out", out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["key"] for line in lines] == [str(image)] * 2
    assert lines[0]["answer"] == lines[1]["answer"]
    printed = capsys.readouterr().out
    assert f"{image}: {lines[0]['answer']}" in printed
    assert run(*asked, "--stream") == 0
    assert capsys.readouterr().out.split() == printed.split()
    assert run(*asked, "--out", out) == 1
    assert "output exists" in capsys.readouterr().err


def test_evaluate_and_page(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (
        "evaluate",
        "--checkpoint",
        place / "tiny",
        "--dataset",
        place / "scenes",
        "--max-new-tokens",
        "4",
    )
    assert run(*common, "--out", tmp_path / "base.json") == 0
    assert run(*common, "--out", tmp_path / "blank.json", "--blank-images") == 0
    base, blank = (read_evaluation(tmp_path / f"{name}.json") for name in ("base", "blank"))
    assert not base.blank_images
    assert blank.blank_images
    assert [item.key for item in base.items] == [item.key for item in blank.items]
    assert base.items != blank.items
    assert "answers right" in capsys.readouterr().out
    page = (
        "page",
        "--base",
        tmp_path / "base.json",
        "--tuned",
        tmp_path / "base.json",
        "--out",
        tmp_path / "page.html",
    )
    assert run(*page, "--blank", tmp_path / "blank.json") == 0
    assert "After, pictures blanked" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--checkpoint", "nowhere"), "checkpoint folder not found"),
        (("--checkpoint", "tiny", "--image", "bad.png"), "image does not decode"),
        (("--checkpoint", "tiny", "--image", "none.png"), "image cannot be read"),
        (("--checkpoint", "tiny", "--audio", "red.png"), "takes no audio"),
        (("--checkpoint", "tiny", "--prompt", "red " * 5000), "longer than the context"),
        (("--checkpoint", "tiny", "--prompt", "<|im_end|>"), "special token"),
        (("--checkpoint", "tiny", "--each"), "nothing is asked"),
        (
            ("evaluate", "--checkpoint", "tiny", "--dataset", "nodata", "--out", "e.json"),
            "not a prepared dataset",
        ),
        (
            ("evaluate", "--checkpoint", "tiny", "--dataset", "scenes", "--split", "test", "--out", "e.json"),
            "no 'test' split",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(
    place: Path,
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    assert run(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_one_line_keeps_every_part_of_an_error() -> None:
    error = DataError("what", where="here", expected="a\nb", got="c", fix="do it")
    assert one_line(error) == "error: what; at: here; expected: a b; got: c; fix: do it"
