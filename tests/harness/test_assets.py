# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from harness.assets import (
    CHECKPOINTS,
    CONFIGS,
    DATASETS,
    config_name,
    ensure_inputs,
    make,
    maker,
    run_program,
)
from harness.cases import Case, MissingInput
from models.contract.errors import ConfigError, RunError
from models.contract.families import detect_family, published_names
from models.contract.site import Site
from suites.detection.synthetic import SyntheticRun, recipe_of


def missing(kind: str, name: str, path: Path) -> MissingInput:
    return MissingInput(kind=kind, name=name, path=path, fix="fetch it")


def test_maker_knows_only_what_can_be_made(tmp_path: Path) -> None:
    assert maker(missing("checkpoint", "tiny-qwen3_vl", tmp_path)) is not None
    assert maker(missing("dataset", "scenes", tmp_path)) is not None
    # the name of a checkpoint is not that of a dataset
    assert maker(missing("dataset", "tiny-qwen3_vl", tmp_path)) is None
    assert maker(missing("checkpoint", "Qwen3-VL-8B-Instruct", tmp_path)) is None


def test_steps_write_to_the_path_that_is_missing(tmp_path: Path) -> None:
    for steps in (*CHECKPOINTS.values(), *DATASETS.values()):
        arguments = steps(tmp_path / "wanted")[-1]
        assert str(tmp_path / "wanted") in arguments
        assert arguments[0].startswith("models.entry.")


def test_sizes_of_every_checkpoint_that_can_be_made_are_known() -> None:
    assert set(CONFIGS) == set(CHECKPOINTS)
    for name, config in CONFIGS.items():
        flags = CHECKPOINTS[name](Path(name))[-1]
        assert ("--moe" in flags) == ("moe" in name)
        assert detect_family(config()) == flags[flags.index("--family") + 1]


def test_every_published_size_has_a_folder_without_weights() -> None:
    for published in published_names():
        [flags] = CHECKPOINTS[config_name(published)](Path("x"))
        assert flags[-1] == "--no-weights"
        assert flags[flags.index("--size") + 1] == published
    [flags] = CHECKPOINTS["sized-qwen3_vl_2b"](Path("x"))
    assert "--no-weights" not in flags


def test_photographs_are_drawn_only_once(tmp_path: Path) -> None:
    assert [step[1] for step in DATASETS["photos"](tmp_path / "photos")] == ["photos", "llava-pretrain"]
    (tmp_path / "photos.raw").mkdir()
    assert [step[1] for step in DATASETS["photos"](tmp_path / "photos")] == ["llava-pretrain"]


def test_ensure_inputs_names_every_path_and_makes_nothing(tmp_path: Path) -> None:
    case = Case(suite="s", hardware="cpu", recipe=recipe_of(SyntheticRun()), recipe_file=tmp_path / "r.toml")
    site = Site(checkpoints=str(tmp_path / "ckpt"), datasets=str(tmp_path / "data"))
    # `scenes` could be made, the checkpoint `tiny` could not: nothing is made before all can be had
    with pytest.raises(ConfigError, match="1 input\\(s\\) missing") as caught:
        ensure_inputs(case, site)
    assert str(tmp_path / "ckpt" / "tiny") in caught.value.expected
    assert list(tmp_path.iterdir()) == []


def test_make_leaves_alone_what_another_process_made(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-qwen3_vl"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    make(missing("checkpoint", "tiny-qwen3_vl", folder))
    assert [item.name for item in folder.iterdir()] == ["config.json"]


def test_run_program_shows_what_a_failed_program_said() -> None:
    with pytest.raises(RunError, match="failed with exit code 2") as caught:
        run_program(["json.tool", "/nowhere/at/all.json"])
    assert "/nowhere/at/all.json" in caught.value.got
