# SPDX-License-Identifier: Apache-2.0
"""Rows of a stated shape: what is in them, who gets which, and that a loader goes on where it was."""

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from models.contract.architecture import Architecture
from models.contract.errors import ConfigError, DataError
from models.contract.families import architecture_from_hf, published_architecture
from models.contract.recipe import parse_recipe
from models.contract.site import Site
from models.contract.tiny_config import sized_config, tiny_config
from models.datasets.fixed_shapes import RowShape, fixed_batch
from models.datasets.loader import BatchLoader, build_loader
from models.training.loader_resharding import loader_state_for

TINY = architecture_from_hf(tiny_config("qwen3_vl"))
SHAPES = {"samples": 2, "images": 4, "image_size": 64}
"""Two samples of 24 tokens in a row of 48: in each two images of 4 tokens after a text token, and 14 of text."""


def make(rank: int = 0, size: int = 1, seed: int = 1234, split: Any = "train", **data: Any) -> BatchLoader:
    recipe = parse_recipe(
        {
            "name": "test", "num_processes": size,
            "model": {"family": "qwen3_vl", "checkpoint": "nowhere", "init": "random"},
            "data": {"dataset": "fixed-shapes", "seq_length": 48, "packing": True, "fixed_shapes": SHAPES} | data,
            "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 4, "seed": seed},
            "optimizer": {"lr": 1e-3},
        },
        where="test",
    )  # fmt: skip
    nowhere = Site(checkpoints="/nowhere", datasets="/nowhere")
    return build_loader(recipe, nowhere, TINY, split=split, data_parallel_rank=rank, data_parallel_size=size)


def keys(loader: BatchLoader, count: int) -> list[str]:
    return [key for batch in itertools.islice(loader, count) for key in batch.sample_keys]


def test_row_is_laid_out_as_stated() -> None:
    batch = next(make())
    image = TINY.tokens.image
    sample = [False, *[True] * 4, False, *[True] * 4, *[False] * 14]
    assert (batch.input_ids == image).tolist() == [sample * 2]
    assert batch.labels is not None
    assert (batch.labels == -100).tolist() == [sample * 2]
    text = batch.labels != -100
    assert torch.equal(
        batch.labels[0, 10:23], batch.input_ids[0, 11:24]
    )  # the next token, inside of a sample
    assert batch.labels[text].max() < TINY.tokens.vision_start  # the first of them
    assert batch.vision_positions is not None
    assert batch.vision_positions.tolist() == [i for i, is_image in enumerate(sample * 2) if is_image]
    assert batch.position_ids.tolist() == [[[*range(24), *range(24)]]] * 3
    assert batch.cu_seqlens is not None
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 24, 48], 24)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.grid_thw is not None
    assert batch.grid_thw.tolist() == [[1, 4, 4]] * 4
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (4 * 16, TINY.vision.patch_dim)
    assert (batch.num_real_tokens, batch.num_supervised_tokens, batch.num_images) == (48, 32, 4)
    assert batch.sample_lengths == (24, 24)


def test_row_of_one_text_is_plain() -> None:
    batch = next(make(packing=False, fixed_shapes={"samples": 1, "images": 0}))
    assert batch.cu_seqlens is batch.pixel_values is batch.grid_thw is batch.vision_positions is None
    assert batch.input_ids.shape == (1, 48)
    assert (batch.max_seqlen, batch.num_supervised_tokens, len(batch.sample_keys)) == (0, 48, 1)


def test_rows_have_one_shape_and_words_of_their_own() -> None:
    first, second = itertools.islice(make(), 2)
    assert first.input_ids.shape == second.input_ids.shape
    assert not torch.equal(first.input_ids, second.input_ids)
    assert not set(first.sample_keys) & set(second.sample_keys)
    again = next(make())
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.sample_keys == again.sample_keys
    assert keys(make(seed=2), 4) != keys(make(), 4)


@pytest.mark.parametrize("size", [2, 4])
def test_global_batch_is_the_same_for_every_number_of_ranks(size: int) -> None:
    one = keys(make(), 8)
    ranks = [keys(make(rank=rank, size=size), 8 // size) for rank in range(size)]
    assert len({key for rank in ranks for key in rank}) == 16  # two samples a row, and nobody shares one
    half = len(ranks[0]) // 2
    for step in range(2):
        split = [key for rank in ranks for key in rank[step * half : (step + 1) * half]]
        assert sorted(split) == sorted(one[step * 8 : (step + 1) * 8])


def test_state_restores_exactly_and_counts_go_on() -> None:
    loader = make()
    keys(loader, 3)
    assert (loader.num_read, loader.num_skipped, loader.skipped) == (6, 0, [])
    state = json.loads(json.dumps(loader.state_dict()))
    expected = list(itertools.islice(loader, 2))
    other = make()
    other.load_state_dict(state)
    assert other.num_read == 6
    for ours, theirs in zip(itertools.islice(other, 2), expected, strict=True):
        assert ours.sample_keys == theirs.sample_keys
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert ours.pixel_values is not None
        assert theirs.pixel_values is not None
        assert torch.equal(ours.pixel_values, theirs.pixel_values)
    other.close()


def test_state_of_other_rows_is_refused() -> None:
    state = make().state_dict()
    with pytest.raises(DataError, match="another run") as caught:
        make(fixed_shapes=SHAPES | {"images": 2}).load_state_dict(state)
    assert "2 image(s) of 64²" in caught.value.expected
    with pytest.raises(DataError, match="another run"):
        make(seed=2).load_state_dict(state)


def test_states_of_two_ranks_serve_one_and_four() -> None:
    ranks = [make(rank=rank, size=2) for rank in range(2)]
    for loader in ranks:
        keys(loader, 2)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in ranks]
    following = keys(make(), 8)[8:]
    for size in (1, 4):
        found = []
        for rank in range(size):
            loader = make(rank=rank, size=size)
            loader.load_state_dict(loader_state_for(states, rank, size, micro_batch_size=1, where="here"))
            found += keys(loader, 4 // size)
        assert sorted(found) == sorted(following)


def test_held_out_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="no held-out part"):
        make(split="val")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"seq_length": 50, "num_samples": 4}, "tokens and images that 4 sample(s) share evenly"),
        ({"num_images": 1, "num_samples": 2}, "tokens and images that 2 sample(s) share evenly"),
        ({"num_images": 1, "image_size": 40}, "an image_size that is a multiple of 32"),
        ({"num_images": 12, "image_size": 64}, "more than 60 tokens a sample, for its 12 image(s)"),
    ],
)
def test_shape_that_cannot_be_made_is_named(shape: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError, match="cannot be made") as caught:
        fixed_batch(TINY, RowShape(**{"seq_length": 48} | shape))
    assert expected in caught.value.expected
    assert "tokens" in caught.value.got
    assert caught.value.fix


@pytest.mark.parametrize(
    ("architecture", "first", "last"),
    [
        (published_architecture("qwen3_vl_2b"), 0, 49_999),  # special tokens far above the words
        (architecture_from_hf(sized_config("qwen3_vl_2b")), 557, 50_573),  # far below them
        (TINY, 0, 552),
    ],
)
def test_words_are_no_special_tokens(architecture: Architecture, first: int, last: int) -> None:
    words = fixed_batch(architecture, RowShape(seq_length=20_000)).input_ids
    assert first <= words.min() <= words.max() <= last


@pytest.mark.slow
def test_benchmarks_need_no_energon() -> None:
    """A GPU machine that runs them has a handful of wheels only."""
    program = "import sys, models.datasets.fixed_shapes; print([n for n in sys.modules if 'energon' in n])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
