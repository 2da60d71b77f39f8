# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from harness.cases import SUITES, cases_of_folder, discover, missing_inputs
from models.contract.errors import ConfigError
from models.contract.site import Site

RECIPE = """
name = "{name}"
hardware = {hardware}
[model]
family = "qwen3_vl"
checkpoint = "nowhere-8b"
[data]
dataset = "nothing"
seq_length = 64
[train]
train_iters = 3
micro_batch_size = 1
global_batch_size = 2
[optimizer]
lr = 1e-3
"""


def write_recipe(folder: Path, file: str, *, name: str = "tiny", hardware: str = '["cpu"]') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    path.write_text(RECIPE.format(name=name, hardware=hardware))
    return path


def test_cases_are_recipes_times_hardware(tmp_path: Path) -> None:
    write_recipe(tmp_path / "debug", "a.toml", name="a", hardware='["cpu", "h20"]')
    write_recipe(tmp_path / "debug", "_parent.toml", name="b")
    write_recipe(tmp_path / "speed", "c.toml", name="c", hardware='["npu_a2"]')
    assert [case.id for case in discover(tmp_path)] == ["debug/a@cpu", "debug/a@h20", "speed/c@npu_a2"]


def test_case_markers_name_hardware_family_and_devices(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a.toml", hardware='["cpu", "h20"]')
    on_cpu, on_gpu = cases_of_folder(tmp_path)
    assert on_cpu.markers == ("cpu", "qwen3_vl")
    assert on_gpu.markers == ("h20", "qwen3_vl", "gpu1")


def test_cases_refuse_unknown_hardware(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "a.toml", hardware='["h2o"]')
    with pytest.raises(ConfigError, match="unknown hardware class 'h2o'") as caught:
        cases_of_folder(tmp_path)
    assert str(file) in caught.value.__notes__[0]


def test_cases_refuse_two_recipes_of_one_name(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a.toml", name="same")
    write_recipe(tmp_path, "b.toml", name="same")
    with pytest.raises(ConfigError, match="two recipes are named 'same'"):
        cases_of_folder(tmp_path)


def test_missing_inputs_say_which_path_and_how_to_get_it(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a.toml")
    site = Site(checkpoints=str(tmp_path / "ckpt"), datasets=str(tmp_path / "data"))
    checkpoint, dataset = missing_inputs(cases_of_folder(tmp_path)[0], site)
    assert checkpoint.path == tmp_path / "ckpt" / "nowhere-8b"
    assert "site.toml" in checkpoint.fix
    assert dataset.path == tmp_path / "data" / "nothing"
    assert "qwen-harness data" in dataset.fix


def test_missing_inputs_name_no_dataset_where_rows_are_stated(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "a.toml")
    shapes = '"fixed-shapes"\nfixed_shapes = { samples = 1, images = 0 }'
    file.write_text(file.read_text().replace('"nothing"', shapes))
    site = Site(checkpoints=str(tmp_path / "ckpt"), datasets=str(tmp_path / "data"))
    assert [item.kind for item in missing_inputs(cases_of_folder(tmp_path)[0], site)] == ["checkpoint"]


def test_missing_inputs_is_empty_when_all_is_there(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a.toml")
    (tmp_path / "ckpt" / "nowhere-8b").mkdir(parents=True)
    (tmp_path / "ckpt" / "nowhere-8b" / "config.json").write_text("{}")
    (tmp_path / "data" / "nothing" / ".nv-meta").mkdir(parents=True)
    site = Site(checkpoints=str(tmp_path / "ckpt"), datasets=str(tmp_path / "data"))
    assert missing_inputs(cases_of_folder(tmp_path)[0], site) == []


def test_shipped_suites_load_and_have_cases_for_h20_and_cpu() -> None:
    cases = discover(SUITES)
    assert {case.suite for case in cases} >= {"convergence", "debug", "throughput"}
    for hardware in ("cpu", "h20"):
        assert [case for case in cases if case.suite == "convergence" and case.hardware == hardware]
