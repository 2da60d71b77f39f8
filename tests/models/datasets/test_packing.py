# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.contract.recipe import DataSection
from models.datasets.encoder import Rejection, make_encoder
from models.datasets.energon import open_dataset, worker_config
from models.datasets.packing import packing_buffer_size, plan_packs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), max_size=60), st.integers(20, 100))
def test_plan_packs_keeps_every_sample_within_both_bounds(samples, budget):
    lengths = [length for length, _ in samples]
    vision = [int(length * share) for length, share in samples]
    packs = plan_packs(lengths, vision, capacity=100, vision_budget=budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(samples)))
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= 100
        assert len(pack) == 1 or sum(vision[i] for i in pack) <= budget


def test_plan_packs_fills_by_best_fit():
    assert plan_packs([60, 50, 40, 50], [0] * 4, capacity=100) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("budget", [None, 7 / 8])
@pytest.mark.parametrize("capacity", [4096, 8192, 16384])
def test_llava_like_lengths_pack_to_95_percent_real_tokens(capacity, budget):
    """Captions of 20 to 60 tokens behind images of 64 to 1,280, and a few long chats: what LLaVA mixes hold."""
    rng = np.random.default_rng(0)
    count = packing_buffer_size(DataSection(dataset="x", seq_length=capacity))
    images = rng.choice(
        [64, 121, 144, 256, 400, 576, 1024], count, p=[0.05, 0.15, 0.35, 0.25, 0.1, 0.08, 0.02]
    )
    lengths = images + rng.integers(20, 60, count) + (rng.random(count) < 0.1) * rng.integers(200, 900, count)
    limit = None if budget is None else int(budget * capacity)
    packs = plan_packs(lengths.tolist(), images.tolist(), capacity=capacity, vision_budget=limit)
    assert lengths.sum() / (len(packs) * capacity) >= 0.95


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_measure_is_exact_without_decoding(family, checkpoint_of, scenes_folder):
    folder, architecture = checkpoint_of(family)
    encoder = make_encoder(DataSection(dataset="x", seq_length=512), architecture, folder)
    reader = open_dataset(str(scenes_folder), "train", worker_config(0, 1, 0, 0), training=False).reader()
    for index in range(0, 96, 4):
        encoded, measured = encoder(reader[index]), encoder.measure(reader[index])
        assert not isinstance(encoded, Rejection)
        assert measured == (encoded.length, encoded.num_vision_tokens)
