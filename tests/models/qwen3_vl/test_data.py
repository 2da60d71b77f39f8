# SPDX-License-Identifier: Apache-2.0
"""Oracle: transformers' processor and get_rope_index, on the same media and messages."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.video_utils import VideoMetadata

from models.common.batching import build_batch
from models.common.processing import DecodedVideo, load_processor, process_image
from models.common.sequences import encode_sample
from models.contract.families import load_architecture
from models.contract.tiny_config import tiny_config
from models.conversion.tiny_processor import write_processor_files
from models.datasets.chat import render_chat, tokenize_chat
from models.datasets.sample import Turn
from models.qwen3_vl.data import patch_timestamps, process_video


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(tiny_config("qwen3_vl")), encoding="utf-8")
    write_processor_files(folder, "qwen3_vl")
    architecture = load_architecture(folder)
    return load_processor(folder, architecture.vision), architecture


def image(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(frames: int, fps: float, seed: int, *, is_sampled: bool = True) -> DecodedVideo:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8)
    return DecodedVideo(pixels, fps, is_sampled)


def chat(user: str) -> list[Turn]:
    return [
        Turn("user", user),
        Turn("assistant", "A red circle."),
        Turn("user", "Sure?"),
        Turn("assistant", "yes"),
    ]


CASES = {
    "text": ("Repeat: red", []),
    "image": ("<image>\nWhat is it?", [image(96, 64, 1)]),
    "images of different sizes": (
        "One <image> two <image> three <image>",
        [image(64, 128, 2), image(96, 96, 3), image(40, 200, 4)],
    ),
    "video": ("<video>Where?", [video(6, 2.0, 5)]),
    "odd frames": ("<video>Where?", [video(5, 3.0, 6)]),
    "sampled here": ("<video>Where?", [video(23, 7.5, 7, is_sampled=False)]),
    "mixed": ("<image>a<video>b<image>", [image(64, 64, 9), video(4, 1.0, 10), image(128, 96, 11)]),
}  # fmt: skip


def encode(tiny, name):
    processor, architecture = tiny
    text, media = CASES[name]
    items = tuple(
        (process_video if isinstance(medium, DecodedVideo) else process_image)(
            medium, processor, architecture
        )
        for medium in media
    )
    tokens = tokenize_chat(processor, chat(text), items, loss_mask="assistant")
    return encode_sample(name, tokens.ids, tokens.supervised, items, architecture.tokens)


def oracle(tiny, name):
    """What transformers' processor makes of the same chat."""
    processor, _ = tiny
    text, media = CASES[name]
    images = [medium for medium in media if isinstance(medium, Image.Image)] or None
    videos = [medium for medium in media if isinstance(medium, DecodedVideo)]
    given = {}
    if videos:
        is_sampled = videos[0].is_sampled
        metadata = [
            VideoMetadata(
                total_num_frames=len(v.frames), fps=v.fps,
                frames_indices=list(range(len(v.frames))) if is_sampled else None,
            )
            for v in videos
        ]  # fmt: skip
        given = {
            "videos": [v.frames for v in videos],
            "video_metadata": metadata,
            "do_sample_frames": not is_sampled,
        }
    return processor(text=[render_chat(processor, chat(text))], images=images, return_tensors="pt", **given)


def rope_index(ids, out, attention_mask=None):
    config = Qwen3VLConfig(**{k: v for k, v in tiny_config("qwen3_vl").items() if k != "model_type"})
    model = Qwen3VLModel.__new__(Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    types = torch.zeros_like(ids)
    types[ids == config.image_token_id], types[ids == config.video_token_id] = 1, 2
    return model.get_rope_index(
        ids, types, out.get("image_grid_thw"), out.get("video_grid_thw"), attention_mask
    )[0]


@pytest.mark.parametrize("name", CASES)
def test_encode_matches_transformers(tiny, name):
    ours, theirs = encode(tiny, name), oracle(tiny, name)
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(ours.position_ids, rope_index(theirs["input_ids"], theirs)[:, 0])
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pixels = [item.pixel_values for item in ours.items if item.kind == kind]
        if pixels:
            assert torch.equal(torch.cat(pixels), theirs[key])


def test_batch_positions_match_transformers_with_padding(tiny):
    names = list(CASES)
    batch = build_batch([encode(tiny, name) for name in names], pad_token=tiny[0].tokenizer.pad_token_id)
    outs = [oracle(tiny, name) for name in names]
    merged = {
        key: torch.cat([out[key] for out in outs if key in out])
        for key in ("image_grid_thw", "video_grid_thw")
    }
    mask = torch.zeros_like(batch.input_ids)
    for row, length in enumerate(batch.sample_lengths):
        mask[row, :length] = 1
    assert torch.equal(batch.position_ids, rope_index(batch.input_ids, merged, mask))


def test_video_of_several_patches_is_one_item_with_a_run_a_patch(tiny):
    processor, architecture = tiny
    item = process_video(video(6, 2.0, 1), processor, architecture)
    assert item.grid_thw[0] == 3
    assert len(item.runs) == 3
    assert item.text.count(processor.video_token) == 3
    assert item.text.startswith("<0.2 seconds>")


def test_patch_timestamps_are_midway_and_repeat_the_last_frame():
    assert patch_timestamps([0, 10, 20], 10.0, 2) == [0.5, 2.0]
