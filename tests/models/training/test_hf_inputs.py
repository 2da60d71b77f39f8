# SPDX-License-Identifier: Apache-2.0
"""Our micro-batches in transformers' words, and the blank media that keep sharded towers busy."""

import dataclasses

import pytest
import torch

from models.common.batch import IGNORED_LABEL, Batch
from models.contract.families import published_architecture
from models.training.hf_inputs import BLANK_FRAMES, hf_inputs, with_blank_media
from models.training.load_balance import load_balancing_loss

OMNI = published_architecture("qwen3_omni_30b_a3b")
VL = published_architecture("qwen3_vl_8b")


def text_batch(*, packed: bool) -> Batch:
    shape = (1, 12) if packed else (2, 6)
    ids = torch.arange(12).view(shape)
    return Batch(
        input_ids=ids, labels=ids + 1, position_ids=torch.arange(36).view(3, *shape), sample_keys=("x", "y"),
        sample_lengths=(6, 6), cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32) if packed else None,
        num_supervised_tokens=12,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_blank_media_are_appended_without_a_label(packed: bool) -> None:
    batch = text_batch(packed=packed)
    blank = with_blank_media(batch, OMNI)
    tokens = [OMNI.tokens.vision_start, OMNI.tokens.image, OMNI.tokens.vision_end, OMNI.tokens.audio]
    assert blank.labels is not None
    if packed:
        assert blank.input_ids[0].tolist() == [*range(12), *tokens]
        assert blank.labels[0, 12:].tolist() == [IGNORED_LABEL] * 4
        assert blank.cu_seqlens is not None
        assert blank.cu_seqlens.tolist() == [0, 6, 12, 16]
    else:
        assert blank.input_ids[:2].tolist() == batch.input_ids.tolist()
        assert blank.input_ids[2].tolist() == [*tokens, 0, 0]
        assert blank.labels[2].tolist() == [IGNORED_LABEL] * 6
    flat = blank.input_ids.flatten()
    assert blank.vision_positions is not None
    assert blank.audio_positions is not None
    assert flat[blank.vision_positions].tolist() == [OMNI.tokens.image]
    assert flat[blank.audio_positions].tolist() == [OMNI.tokens.audio]
    assert blank.num_supervised_tokens == batch.num_supervised_tokens


def test_blank_media_are_only_added_where_they_are_missing() -> None:
    batch = text_batch(packed=False)
    seen = with_blank_media(batch, VL)
    assert seen.input_features is None
    assert with_blank_media(seen, VL) is seen
    without_labels = dataclasses.replace(batch, labels=None)
    assert with_blank_media(without_labels, OMNI) is without_labels


def test_packed_rows_tell_samples_apart_by_text_positions() -> None:
    inputs = hf_inputs(text_batch(packed=True), VL)
    assert inputs["position_ids"].shape == (4, 1, 12)
    assert inputs["position_ids"][0, 0].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert hf_inputs(text_batch(packed=False), VL)["position_ids"].shape == (3, 2, 6)


def test_clips_are_padded_with_a_mask() -> None:
    features = torch.arange(10.0).view(2, 5)
    batch = dataclasses.replace(
        text_batch(packed=False), input_features=features, audio_lengths=torch.tensor([3, 2])
    )
    inputs = hf_inputs(batch, OMNI)
    assert inputs["input_features"].tolist() == [[[0, 1, 2], [5, 6, 7]], [[3, 4, 0], [8, 9, 0]]]
    assert inputs["feature_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert BLANK_FRAMES == 8  # three strides of two leave one token


def test_load_balancing_loss_is_megatrons_and_leaves_out_what_was_appended() -> None:
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    torch.manual_seed(0)
    logits = torch.randn(3 * 5, 4)
    probabilities = logits[:10].softmax(-1)
    chosen = torch.zeros(10, 4).scatter_(1, probabilities.topk(2).indices, 1.0)
    expected = switch_load_balancing_loss_func(probabilities, chosen.sum(0), 10, 2, 4, 1.0)
    rows = load_balancing_loss([logits], torch.Size([2, 5]), 2)  # a third row was appended
    columns = load_balancing_loss([logits[:13]], torch.Size([1, 10]), 2)  # three places of the row were
    assert rows.tolist() == pytest.approx([float(expected)], rel=1e-6)
    assert columns.tolist() == pytest.approx([float(expected)], rel=1e-6)
