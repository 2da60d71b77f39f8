# SPDX-License-Identifier: Apache-2.0
"""The pages under docs/: every command block runs, both languages hold the same commands, every key and file exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from models.contract import recipe as recipes

REPOSITORY = Path(__file__).resolve().parents[2]
WALKTHROUGHS = REPOSITORY / "docs" / "walkthroughs"
PAGES = sorted(path for path in WALKTHROUGHS.glob("*.md") if not path.name.endswith(".zh.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    name: field.annotation
    for name, field in recipes.Recipe.model_fields.items()
    if name in {"model", "data", "train", "optimizer", "parallel", "precision", "checkpoint"}
}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def chinese(page: Path) -> Path:
    return page.with_name(page.name.replace(".md", ".zh.md"))


def recipe_keys(page: Path) -> list[str]:
    """`section.key` in code marks, without a value."""
    marks = re.findall(r"`([a-z_]+\.[a-z_0-9]+)(?: = [^`]*)?`", page.read_text(encoding="utf-8"))
    return [mark for mark in marks if mark.split(".")[0] in SECTIONS]


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run all blocks of a page as one script, in a folder that sees the repository's recipes and nothing else of it."""
    for name in ("suites", "docs", "models", "harness"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "site.toml").write_text(
        "".join(f'{name} = "{folder}/work/{name}"\n' for name in ("checkpoints", "datasets", "scratch"))
    )
    (folder / "work" / "checkpoints").mkdir(parents=True)
    program = "import sys; from harness.cli import main; main(sys.argv[1:])"
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("qwen-harness", f"-c '{program}'"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    script = "set -euo pipefail\n" + "\n".join(blocks(page, "bash"))
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "QWEN_HARNESS_SITE": str(folder / "site.toml"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_there_is_one_page_for_each_tutorial() -> None:
    assert [page.stem for page in PAGES] == [
        "fsdp2", "qwen2_5_vl_pretrain", "qwen3_omni", "qwen3_vl_full", "qwen3_vl_lite"
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_hold_the_same_commands(page: Path) -> None:
    assert blocks(page, "bash")
    for language in ("bash", "console"):
        assert blocks(chinese(page), language) == blocks(page, language)
    assert recipe_keys(chinese(page)) == recipe_keys(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_recipe_keys_exist(page: Path) -> None:
    keys = recipe_keys(page)
    assert len(keys) >= 2
    for section, _, key in (name.partition(".") for name in keys):
        assert key in SECTIONS[section].model_fields, f"{section}.{key}"  # type: ignore[union-attr]


@pytest.mark.parametrize("page", [*PAGES, *map(chinese, PAGES)], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:suites|tests|docs|models|harness)/[\w./-]+\w", text):
        assert (REPOSITORY / name).exists(), name
    for recipe in re.findall(r"suites/[\w/]+\.toml", text):
        recipes.load_recipe(REPOSITORY / recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_need_a_network_or_a_gpu_still_exist(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Console blocks are not run; their verbs and options must be known all the same."""
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.removeprefix("$ ").split("#")[0].split()
            if words[:2] != ["qwen-harness", "data"]:
                continue
            help_text = subprocess.run(
                [sys.executable, "-m", "models.entry.prepare", words[2], "--help"],
                cwd=REPOSITORY, capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            for option in (word for word in words if word.startswith("--")):
                assert option in help_text, f"{words[2]} {option}"
    assert callable(main)
    capsys.readouterr()


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nqwen-harness doctor --no-such-option\n```\n")
    (tmp_path / "place").mkdir()
    done = run_page(page, tmp_path / "place")
    assert done.returncode == 2
