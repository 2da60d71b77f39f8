# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest

from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, load_recipe, parse_recipe

MINIMAL = """
name = "tiny"
[model]
family = "qwen3_vl"
checkpoint = "tiny-qwen3-vl"
[data]
dataset = "scenes"
seq_length = 64
[train]
train_iters = 500
micro_batch_size = 2
global_batch_size = 8
[optimizer]
lr = 1e-3
"""


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> Recipe:
    return load_recipe(write(folder, text))


def test_recipe_fills_defaults_and_derives_sizes(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.data_parallel_size, recipe.num_microbatches, recipe.lr_decay_iters) == (1, 4, 500)


def test_recipe_hash_ignores_names_and_sees_numbers(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    renamed = load(tmp_path, MINIMAL.replace('name = "tiny"', 'name = "other"\ndescription = "x"'))
    changed = load(tmp_path, MINIMAL.replace("1e-3", "1.001e-3"))
    assert recipe.sha() == renamed.sha()
    assert recipe.sha() != changed.sha()


def test_recipe_hash_is_the_same_with_a_default_written_out(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).sha() == load(tmp_path, MINIMAL + "weight_decay = 0.01\n").sha()


def test_recipe_hash_is_that_of_a_recipe_without_the_table_where_it_is_left_out(tmp_path: Path) -> None:
    # of the version before [data.fixed_shapes] was added
    assert load(tmp_path, MINIMAL).sha() == "39c43da4365d99cc"
    shapes = MINIMAL + "[data.fixed_shapes]\nsamples = 1\nimages = 1\n"
    hashes = {load(tmp_path, text).sha() for text in (MINIMAL, shapes, shapes + "image_size = 336\n")}
    assert len(hashes) == 3


def test_recipe_hash_sees_a_later_key_only_where_it_is_not_its_default(tmp_path: Path) -> None:
    chosen, *defaults = (
        load(tmp_path, MINIMAL.replace("[model]", f'[model]\nexperts_backend = "{backend}"'))
        for backend in ("grouped", "auto", "te")
    )
    plain = load(tmp_path, MINIMAL).sha()
    assert {recipe.sha() for recipe in defaults} == {plain}
    assert chosen.sha() != plain
    assert chosen.model.experts_backend == "grouped"
    gathered, *others = (
        load(tmp_path, f'{MINIMAL}[parallel]\nmoe_token_dispatcher_type = "{dispatcher}"\n')
        for dispatcher in ("allgather", "auto", "alltoall")
    )
    assert {recipe.sha() for recipe in others} == {plain}
    assert gathered.sha() not in (plain, chosen.sha())
    assert load(tmp_path, MINIMAL).parallel.moe_token_dispatcher_type == "auto"


def test_recipe_names_the_nearest_key_of_a_table_that_may_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL + "[data.fixed_shapes]\nsamples = 1\nimages = 1\nimage_sze = 336\n")
    assert "unknown key 'data.fixed_shapes.image_sze': did you mean 'image_size'?" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("micro_batch_size = 2", "micro_batchsize = 2", "did you mean 'micro_batch_size'?"),
        ("[data]", "[dat]", "did you mean 'data'?"),
        ("lr = 1e-3", "lr = -1", "greater than 0"),
        ("lr = 1e-3", "lr = nan", "finite"),
        ("train_iters = 500", 'train_iters = "500"', "valid integer"),
        ("train_iters = 500", "train_iters = 500.0", "valid integer"),
        ("train_iters = 500", "train_iters = true", "valid integer"),
        ("global_batch_size = 8", "global_batch_size = 9", "not a multiple of"),
        ('family = "qwen3_vl"', 'family = "llava"', "qwen2_5_vl"),
        ('name = "tiny"', 'name = "../evil"', "pattern"),
    ],
)
def test_recipe_names_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match="problem") as caught:
        load(tmp_path, MINIMAL.replace(old, new))
    assert message in str(caught.value)
    assert "recipe.toml" in str(caught.value)


def test_recipe_collects_every_problem_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path, MINIMAL.replace("lr = 1e-3", "lrr = 1e-3").replace("seq_length = 64", "seq_length = 1")
        )
    assert "optimizer.lrr" in str(caught.value)
    assert "data.seq_length" in str(caught.value)


def test_recipe_missing_file_and_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path, "name = ")


def test_recipe_extends_one_level(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.toml")
    child = write(tmp_path, 'extends = "base.toml"\n[optimizer]\nlr = 5e-4\n', "child.toml")
    assert load_recipe(child).optimizer.lr == 5e-4
    assert load_recipe(child).train.train_iters == 500
    grandchild = write(tmp_path, 'extends = "child.toml"\n', "grandchild.toml")
    with pytest.raises(ConfigError, match="extends another"):
        load_recipe(grandchild)


def test_recipe_layout_must_divide_processes() -> None:
    data: dict[str, Any] = {
        "name": "x",
        "num_processes": 3,
        "model": {"family": "qwen3_vl", "checkpoint": "c"},
        "data": {"dataset": "d", "seq_length": 64},
        "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 6},
        "optimizer": {"lr": 1e-3},
        "parallel": {"tensor_model_parallel_size": 2},
    }
    with pytest.raises(ConfigError, match=r"tp\*pp\*cp"):
        parse_recipe(data, where="test")


def test_every_shipped_recipe_loads() -> None:
    suites = Path(__file__).resolve().parents[3] / "suites"
    recipes = sorted(suites.glob("*/[!_]*.toml"))
    assert recipes
    names = [(path.parent.name, load_recipe(path).name) for path in recipes]
    assert len(set(names)) == len(names)
