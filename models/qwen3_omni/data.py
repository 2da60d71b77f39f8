# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: images, videos and audio to runs with position ids.

One clock for everything: `position_id_per_seconds` positions a second. Audio tokens take one position each; a
temporal patch of a video stands where its time is. With the sound of a video, its audio tokens are sorted in between::

    <|audio_start|>  V V V V  A A A A A A A A A A A A A  V V V V  A …  <|audio_end|>     by position, video first

Rules and roundings are those of transformers' `Qwen3OmniMoe` thinker, the oracle in the tests.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.common.processing import DEFAULT_VIDEO_FPS, DecodedVideo, run_video_processor
from models.common.sequences import MediaItem, MediaRun, grid_run, line_run
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError

MEDIA_KINDS = ("image", "video", "audio")
TOKENS_PER_CHUNK = 13
"""Audio tokens of a whole chunk of 2 * n_window mel frames, after three convolutions of stride two."""


def process_video(
    video: DecodedVideo, processor: Any, architecture: Architecture, sound: np.ndarray | None = None
) -> MediaItem:
    """One video, with its sound if given, to patches, features and one run.

    Args:
        video: Decoded frames.
        processor: The checkpoint's processor.
        architecture: Sizes and token ids.
        sound: Its audio track, mono [n] float32 at the feature extractor's rate.

    Raises:
        ValueError: transformers refuses the video.
    """
    pixel_values, grid, _ = run_video_processor(processor, video)
    merge = architecture.vision.spatial_merge_size
    rate = video.fps if video.is_sampled else (processor.video_processor.fps or DEFAULT_VIDEO_FPS)
    second_per_grid = architecture.vision.temporal_patch_size / rate
    time = _whole_if_possible(torch.arange(grid[0]).float() * second_per_grid * _clock(architecture))
    run = grid_run(architecture.tokens.video, grid[0], grid[1] // merge, grid[2] // merge, time=time)
    text, features = processor.video_token, None
    if sound is None:
        run = MediaRun(ids=run.ids, offsets=run.offsets, advance=run.offsets.max().item() + 1)
    else:
        features = mel_features(sound, processor)
        audio = line_run(_audio_token(architecture), num_audio_tokens(features.shape[1], architecture))
        run = interleave(run, audio)
        text = f"{processor.audio_bos_token}{text}{processor.audio_eos_token}"
    return MediaItem(
        kind="video",
        text=text,
        runs=(run,),
        pixel_values=pixel_values,
        grid_thw=grid,
        input_features=features,
    )


def process_audio(samples: np.ndarray, processor: Any, architecture: Architecture) -> MediaItem:
    """One clip, mono [n] float32 at the feature extractor's rate, to mel features and its run."""
    features = mel_features(samples, processor)
    count = num_audio_tokens(features.shape[1], architecture)
    run = line_run(_audio_token(architecture), count)
    return MediaItem(kind="audio", text=processor.audio_token, runs=(run,), input_features=features)


def mel_features(samples: np.ndarray, processor: Any) -> Tensor:
    """Log-mel frames of one clip by the checkpoint's feature extractor, [mel, a] float32, no padding.

    Raises:
        ValueError: more than one channel, or shorter than one frame.
    """
    extractor = processor.feature_extractor
    if samples.ndim != 1:
        raise ValueError(f"audio of shape {samples.shape}, needs one channel [n]: average the channels first")
    needed = max(extractor.hop_length, extractor.n_fft // 2 + 1)  # the first window mirrors half of itself
    if samples.size < needed:
        raise ValueError(f"{samples.size} audio samples, needs {needed}")
    out = extractor(
        samples, sampling_rate=extractor.sampling_rate, padding=True, truncation=False,
        return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    return out["input_features"][0][:, out["attention_mask"][0].bool()].float().contiguous()


def num_audio_tokens(num_frames: int, architecture: Architecture) -> int:
    """Tokens that the audio tower makes of `num_frames` mel frames: 13 a chunk, fewer for the rest."""
    if architecture.audio is None:
        raise ConfigError("the checkpoint has no audio tower", where="config.json", expected="audio_config")
    chunk = 2 * architecture.audio.n_window
    rest = num_frames % chunk
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return rest + num_frames // chunk * TOKENS_PER_CHUNK


def interleave(video: MediaRun, audio: MediaRun) -> MediaRun:
    """Sort the audio tokens of a video between its vision tokens, by position; video goes first where both meet.

    What follows goes on behind the last stretch of one kind, which need not hold the largest position.
    """
    count = video.ids.numel()
    keys = torch.cat([video.offsets[0].double(), audio.offsets[0].double()])
    order = torch.argsort(keys, stable=True)
    offsets = torch.cat([video.offsets, audio.offsets.to(video.offsets.dtype)], dim=1)[:, order]
    is_video = order < count
    tail = is_video == is_video[-1]
    begin = int((~tail).nonzero().max()) + 1 if (~tail).any() else 0
    return MediaRun(
        ids=torch.cat([video.ids, audio.ids])[order],
        offsets=offsets,
        advance=offsets[:, begin:].max().item() + 1,
    )


def _clock(architecture: Architecture) -> float:
    if architecture.position_id_per_seconds is None:
        raise ConfigError("no position clock", where="config.json", expected="position_id_per_seconds")
    return architecture.position_id_per_seconds


def _audio_token(architecture: Architecture) -> int:
    if architecture.tokens.audio is None:
        raise ConfigError("no audio token", where="config.json", expected="audio_token_id")
    return architecture.tokens.audio


def _whole_if_possible(time: Tensor) -> Tensor:
    whole = time.round()
    return whole.long() if torch.equal(whole, time) else time
