# SPDX-License-Identifier: Apache-2.0
"""Oracle: transformers' processor, feature extractor and the thinker's get_rope_index."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoePreTrainedModelForConditionalGeneration as Thinker,
)

from models.common.batching import build_batch
from models.common.processing import DecodedVideo, load_processor, process_image
from models.common.sequences import encode_sample
from models.contract.families import load_architecture
from models.contract.tiny_config import tiny_config
from models.conversion.tiny_processor import write_processor_files
from models.datasets.chat import render_chat, tokenize_chat
from models.datasets.sample import Turn
from models.qwen3_omni.data import (
    num_audio_tokens,
    process_audio,
    process_video,
)

RATE = 16000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(tiny_config("qwen3_omni")), encoding="utf-8")
    write_processor_files(folder, "qwen3_omni")
    architecture = load_architecture(folder)
    return load_processor(folder, architecture.vision), architecture


def image(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(frames: int, fps: float, seed: int) -> DecodedVideo:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8)
    return DecodedVideo(pixels, fps, is_sampled=True)


def sound(seconds: float, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def chat(user: str) -> list[Turn]:
    return [
        Turn("user", user),
        Turn("assistant", "A red circle."),
        Turn("user", "Sure?"),
        Turn("assistant", "yes"),
    ]


# (text, media); a pair (video, sound) is a video with its sound
CASES = {
    "text": ("Repeat: red", []),
    "image": ("<image>\nWhat is it?", [image(96, 64, 1)]),
    "audio": ("<audio>What?", [sound(1.3, 2)]),
    "image and two clips": ("<image>a<audio>b<audio>c", [image(64, 64, 3), sound(0.4, 4), sound(2.07, 5)]),
    "video": ("<video>Where?", [video(6, 2.0, 6)]),
    "video at another rate": ("<video>Where?", [video(6, 4.0, 7)]),
    "video and clip": ("<video>a<audio>b", [video(4, 1.0, 8), sound(0.9, 9)]),
    "video with its sound": ("a<video>b", [(video(6, 2.0, 10), sound(3.0, 11))]),
    "long sound": ("a<video>b", [(video(4, 2.0, 12), sound(6.4, 13))]),
    "short sound": ("a<video>b", [(video(8, 2.0, 14), sound(0.5, 15))]),
    "two videos with their sounds": (
        "<video>a<video>", [(video(6, 2.0, 16), sound(2.9, 17)), (video(4, 2.0, 18), sound(0.02, 19))],
    ),
}  # fmt: skip


def process(medium, processor, architecture):
    if isinstance(medium, tuple):
        return process_video(*medium[:1], processor, architecture, medium[1])
    if isinstance(medium, DecodedVideo):
        return process_video(medium, processor, architecture)
    if isinstance(medium, np.ndarray):
        return process_audio(medium, processor, architecture)
    return process_image(medium, processor, architecture)


def encode(tiny, name):
    processor, architecture = tiny
    text, media = CASES[name]
    items = tuple(process(medium, processor, architecture) for medium in media)
    tokens = tokenize_chat(processor, chat(text), items, loss_mask="assistant")
    return encode_sample(name, tokens.ids, tokens.supervised, items, architecture.tokens)


def oracle(tiny, name):
    processor, _ = tiny
    text, media = CASES[name]
    pairs = [medium for medium in media if isinstance(medium, tuple)]
    videos = [medium for medium in media if isinstance(medium, DecodedVideo)] + [v for v, _ in pairs]
    clips = [medium for medium in media if isinstance(medium, np.ndarray)] + [clip for _, clip in pairs]
    given = {}
    if videos:
        given = {"videos": [v.frames for v in videos], "do_sample_frames": False, "fps": videos[0].fps}
    images = [medium for medium in media if isinstance(medium, Image.Image)] or None
    out = processor(
        text=[render_chat(processor, chat(text))], images=images, audio=clips or None, return_tensors="pt",
        use_audio_in_video=bool(pairs), **given,
    )  # fmt: skip
    return out, bool(pairs)


def rope_index(ids, out, with_sound, architecture):
    tokens = architecture.tokens
    config = SimpleNamespace(
        image_token_id=tokens.image, video_token_id=tokens.video, audio_token_id=tokens.audio,
        vision_start_token_id=tokens.vision_start, audio_start_token_id=tokens.audio_start,
        position_id_per_seconds=architecture.position_id_per_seconds,
        audio_config=SimpleNamespace(n_window=architecture.audio.n_window),
    )  # fmt: skip
    model = SimpleNamespace(config=config, spatial_merge_size=architecture.vision.spatial_merge_size)
    model.get_llm_pos_ids_for_vision = lambda *args: Thinker.get_llm_pos_ids_for_vision(model, *args)
    mask = out.get("feature_attention_mask")
    seconds = out.get("video_second_per_grid")
    return Thinker.get_rope_index(
        model, ids, out.get("image_grid_thw"), out.get("video_grid_thw"), torch.ones_like(ids), with_sound,
        None if mask is None else mask.sum(-1), None if seconds is None else torch.as_tensor(seconds),
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_encode_matches_transformers(tiny, name):
    ours = encode(tiny, name)
    theirs, with_sound = oracle(tiny, name)
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    expected = rope_index(theirs["input_ids"], theirs, with_sound, tiny[1])[:, 0]
    assert torch.equal(ours.position_ids.float(), expected.float())
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pixels = [item.pixel_values for item in ours.items if item.kind == kind]
        if pixels:
            assert torch.equal(torch.cat(pixels), theirs[key])


@pytest.mark.parametrize("seconds", [0.02, 0.99, 1.0, 2.345])
def test_mel_features_match_the_feature_extractor(tiny, seconds):
    processor, architecture = tiny
    clip = sound(seconds, 1)
    item = process_audio(clip, processor, architecture)
    out = processor.feature_extractor(
        clip,
        sampling_rate=RATE,
        padding=True,
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    assert torch.equal(item.input_features, out["input_features"][0][:, out["attention_mask"][0].bool()])


def test_batch_lays_clips_end_to_end(tiny):
    batch = build_batch(
        [encode(tiny, "image and two clips"), encode(tiny, "text"), encode(tiny, "audio")], pad_token=0
    )
    _, architecture = tiny
    assert batch.input_features.shape[1] == batch.audio_lengths.sum()
    assert batch.num_audios == 3
    tokens = sum(num_audio_tokens(int(length), architecture) for length in batch.audio_lengths)
    assert batch.audio_positions.numel() == tokens
    assert (batch.input_ids.flatten()[batch.audio_positions] == architecture.tokens.audio).all()


def test_unwhole_clock_keeps_its_fractions(tiny):
    processor, architecture = tiny
    item = process_video(video(6, 3.0, 1), processor, architecture)
    assert item.runs[0].offsets.dtype == torch.float32
    ids, learned = torch.tensor([1, architecture.tokens.video, 2]), torch.tensor([0, 0, 1]).bool()
    sample = encode_sample("k", ids, learned, (item,), architecture.tokens)
    step = 2 / 3.0 * 13
    assert sample.position_ids[0].max() == pytest.approx(1 + 2 * step + 1)
