# SPDX-License-Identifier: Apache-2.0
"""Oracle: transformers' processor and get_rope_index, on the same media and messages."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.video_utils import VideoMetadata

from models.common.batching import build_batch
from models.common.processing import DecodedVideo, load_processor, process_image
from models.common.sequences import encode_sample
from models.contract.families import load_architecture
from models.contract.tiny_config import tiny_config
from models.conversion.tiny_processor import write_processor_files
from models.datasets.chat import render_chat, tokenize_chat
from models.datasets.sample import Turn
from models.qwen2_5_vl.data import process_video


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(tiny_config("qwen2_5_vl")), encoding="utf-8")
    write_processor_files(folder, "qwen2_5_vl")
    architecture = load_architecture(folder)
    return load_processor(folder, architecture.vision), architecture


def image(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(frames: int, fps: float, seed: int) -> DecodedVideo:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 56, 84, 3), dtype=np.uint8)
    return DecodedVideo(pixels, fps, is_sampled=True)


def chat(user: str) -> list[Turn]:
    return [
        Turn("user", user),
        Turn("assistant", "A red circle."),
        Turn("user", "Sure?"),
        Turn("assistant", "yes"),
    ]


CASES = {
    "text": ("Repeat: red", []),
    "image": ("<image>\nWhat is it?", [image(84, 56, 1)]),
    "images of different sizes": (
        "One <image> two <image> three <image>",
        [image(56, 112, 2), image(84, 84, 3), image(30, 200, 4)],
    ),
    "video": ("<video>Where?", [video(6, 2.0, 5)]),
    "odd frames": ("<video>Where?", [video(5, 2.0, 6)]),
    "slow video": ("<video>Where?", [video(4, 0.5, 7)]),
    "fast video": ("<video>Where?", [video(8, 8.0, 8)]),
    "mixed": ("<image>a<video>b<image>", [image(56, 56, 9), video(4, 1.0, 10), image(112, 84, 11)]),
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
        metadata = [
            VideoMetadata(
                total_num_frames=len(v.frames), fps=v.fps, frames_indices=list(range(len(v.frames)))
            )
            for v in videos
        ]
        given = {"videos": [v.frames for v in videos], "video_metadata": metadata, "do_sample_frames": False}
    return processor(text=[render_chat(processor, chat(text))], images=images, return_tensors="pt", **given)


def rope_index(ids, out, attention_mask=None):
    config = Qwen2_5_VLConfig(**{k: v for k, v in tiny_config("qwen2_5_vl").items() if k != "model_type"})
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    types = torch.zeros_like(ids)
    types[ids == config.image_token_id], types[ids == config.video_token_id] = 1, 2
    seconds = out.get("second_per_grid_ts")
    return model.get_rope_index(
        ids, types, out.get("image_grid_thw"), out.get("video_grid_thw"), seconds, attention_mask
    )[0]


@pytest.mark.parametrize("name", CASES)
def test_encode_matches_transformers(tiny, name):
    ours, theirs = encode(tiny, name), oracle(tiny, name)
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(ours.position_ids, rope_index(theirs["input_ids"], theirs)[:, 0])
    pixels = {"image": [], "video": []}
    for item in ours.items:
        pixels[item.kind].append(item.pixel_values)
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels[kind]:
            assert torch.equal(torch.cat(pixels[kind]), theirs[key])
    grids = [item.grid_thw for item in ours.items if item.kind == "video"]
    if grids:
        assert torch.equal(torch.tensor(grids), theirs["video_grid_thw"])


def test_batch_positions_match_transformers_with_padding(tiny):
    names = list(CASES)
    batch = build_batch([encode(tiny, name) for name in names], pad_token=tiny[0].tokenizer.pad_token_id)
    outs = [oracle(tiny, name) for name in names]
    merged = {
        key: torch.cat([out[key] for out in outs if key in out])
        for key in ("image_grid_thw", "video_grid_thw")
    }
    merged["second_per_grid_ts"] = torch.cat(
        [torch.as_tensor(out["second_per_grid_ts"]) for out in outs if "second_per_grid_ts" in out]
    )
    mask = torch.zeros_like(batch.input_ids)
    for row, length in enumerate(batch.sample_lengths):
        mask[row, :length] = 1
    assert torch.equal(batch.position_ids, rope_index(batch.input_ids, merged, mask))


def test_batch_counts_and_placeholders_agree(tiny):
    _, architecture = tiny
    batch = build_batch(
        [encode(tiny, name) for name in ("mixed", "text", "image")], pad_token=0, seq_length=128
    )
    flat = batch.input_ids.flatten()
    wanted = ((flat == architecture.tokens.image) | (flat == architecture.tokens.video)).nonzero().flatten()
    assert torch.equal(batch.vision_positions, wanted)
    merged = batch.grid_thw.prod(-1) // architecture.vision.spatial_merge_size**2
    assert merged.sum() == wanted.numel()
    assert batch.pixel_values.shape[0] == batch.grid_thw.prod(-1).sum()
    assert (batch.num_images, batch.num_videos, batch.num_audios) == (3, 1, 0)
    assert batch.num_supervised_tokens == (batch.labels != -100).sum()
    assert batch.num_real_tokens == sum(batch.sample_lengths)


def test_pack_keeps_each_sample_as_it_was(tiny):
    samples = [encode(tiny, name) for name in ("image", "text", "mixed")]
    batch = build_batch(samples, pad_token=0, packing=True, multiple_of=64)
    assert batch.input_ids.shape[1] % 64 == 0
    assert batch.cu_seqlens[-1] == batch.input_ids.shape[1]
    for sample, begin in zip(samples, batch.cu_seqlens, strict=False):
        where = slice(begin, begin + sample.length)
        assert torch.equal(batch.input_ids[0, where], sample.input_ids)
        assert torch.equal(batch.labels[0, where], sample.labels)
        assert torch.equal(batch.position_ids[:, 0, where], sample.position_ids)
    assert batch.num_real_tokens == sum(sample.length for sample in samples)


def test_labels_are_shifted_and_cover_answers_only(tiny):
    processor, _ = tiny
    sample = encode(tiny, "image")
    learned = sample.labels[sample.labels != -100]
    assert processor.tokenizer.decode(learned) == "A red circle.<|im_end|>\nyes<|im_end|>\n"
    where = (sample.labels != -100).nonzero().flatten()
    assert torch.equal(sample.input_ids[where + 1], learned)
