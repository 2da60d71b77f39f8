# SPDX-License-Identifier: Apache-2.0
"""Rules about rows of a stated shape: each is broken once, and named with its key."""

from typing import Any

import pytest

from models.contract.families import published_architecture
from models.contract.fixed_shapes import merged_tokens
from models.contract.layout import check_layout
from models.contract.memory import estimate_memory
from models.contract.recipe import Recipe, parse_recipe
from models.contract.run_rules import check_run

SHAPES = {"samples": 8, "images": 8}


def recipe(**sections: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "name": "case",
        "num_processes": 8,
        "model": {"family": "qwen3_vl", "checkpoint": "x", "init": "random"},
        "data": {
            "dataset": "fixed-shapes",
            "seq_length": 8192,
            "packing": True,
            "fixed_shapes": SHAPES,
        },
        "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 64},
        "optimizer": {"lr": 1e-5},
    }
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section
    return parse_recipe(data, where="test")


def problems(**sections: dict[str, Any]) -> list[str]:
    return [
        str(problem) for problem in check_layout(published_architecture("qwen3_vl_4b"), recipe(**sections))
    ]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"fixed_shapes": {"samples": 8, "images": 0}},
        {"packing": False, "fixed_shapes": {"samples": 1, "images": 1}},
        {"packing": False, "fixed_shapes": {"samples": 1, "images": 41}},  # 41 * 197 tokens, and 115 of text
        {"fixed_shapes": {"samples": 16, "images": 32, "image_size": 32}},
    ],
)
def test_shapes_that_fit_pass(data: dict[str, Any]) -> None:
    assert problems(data=data) == []


@pytest.mark.parametrize(
    ("data", "where", "rule"),
    [
        ({"dataset": "scenes"}, "data.dataset", "the dataset is named 'fixed-shapes' where"),
        ({"fixed_shapes": None, "packing": False}, "data.dataset", "the dataset is named 'fixed-shapes' where"),
        ({"packing": False}, "data.packing", "a row of more than one sample is a pack"),
        ({"fixed_shapes": {"samples": 1, "images": 1}}, "data.packing", "a row of more than one sample is a pack"),
        ({"fixed_shapes": {"samples": 7, "images": 7}}, "data.fixed_shapes.samples", "seq_length must divide"),
        ({"fixed_shapes": {"samples": 8, "images": 7}}, "data.fixed_shapes.images", "images must divide over"),
        ({"fixed_shapes": {"samples": 8, "images": 48}}, "data.fixed_shapes.images", "must leave room for text"),
        ({"packing": False, "fixed_shapes": {"samples": 1, "images": 42}}, "data.fixed_shapes.images", "must leave"),
        ({"fixed_shapes": SHAPES | {"image_size": 420}}, "data.fixed_shapes.image_size", "the side of an image"),
        ({"blank_images": True}, "data.blank_images", "nothing is read, so this has no effect"),
        ({"num_workers": 2}, "data.num_workers", "nothing is read, so this has no effect"),
        ({"max_pixels": 9}, "data.max_pixels", "nothing is read, so this has no effect"),
        ({"padding": "longest"}, "data.padding", "nothing is read, so this has no effect"),
        ({"eval_dataset": "scenes"}, "train.eval_interval", "random rows teach nothing"),
    ],
)  # fmt: skip
def test_broken_rule_is_named_with_its_key(data: dict[str, Any], where: str, rule: str) -> None:
    found = problems(data=data)
    assert any(text.startswith(f"{where}: ") and rule in text for text in found), found


def test_evaluation_and_larger_micro_batches_are_refused() -> None:
    assert any(
        "random rows teach" in text for text in problems(train={"eval_interval": 1, "eval_samples": 8})
    )
    [text] = problems(
        data={"packing": False, "fixed_shapes": {"samples": 1, "images": 0}}, train={"micro_batch_size": 2}
    )
    assert text.startswith("train.micro_batch_size: a stated row is a micro-batch (got 2; set it to 1")


def test_context_parallelism_needs_samples_that_it_can_cut() -> None:
    assert problems(parallel={"context_parallel_size": 4}) == []
    [text] = problems(
        data={"fixed_shapes": {"samples": 2048, "images": 0}}, parallel={"context_parallel_size": 4}
    )
    assert "got 2048 samples in 8192 tokens, 8 pieces" in text


def test_recipes_with_a_dataset_are_none_of_its_business() -> None:
    data = {
        "dataset": "scenes",
        "packing": False,
        "fixed_shapes": None,
        "num_workers": 2,
        "blank_images": True,
    }
    assert check_run(recipe(data=data)) == []


def test_merged_tokens_of_published_towers() -> None:
    assert merged_tokens(published_architecture("qwen2_5_vl_3b").vision, 448) == 16**2
    assert merged_tokens(published_architecture("qwen3_vl_4b").vision, 448) == 14**2
    assert merged_tokens(published_architecture("qwen2_5_vl_7b").vision, 336) == 12**2


def test_memory_counts_the_images_that_are_stated() -> None:
    sizes = published_architecture("qwen3_vl_4b")

    def activations(images: int) -> float:
        shapes = {"samples": 8, "images": images}
        return estimate_memory(recipe(data={"fixed_shapes": shapes}), sizes).activations

    text = activations(0)
    assert activations(32) - text == pytest.approx(4 * (activations(8) - text))
    assert activations(8) > text
