# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: media to runs with position ids.

A video is a row of single frames: every temporal patch stands between its own vision tokens, behind the time it was
taken at, and gets positions like an image::

    <|vision_start|> <0.2 seconds> <|vision_start|> V V V V <|vision_end|> <1.2 seconds> … <|vision_end|>

The outer pair comes from the chat template; transformers 5.17 leaves it standing (4.57 took it away).
"""

from typing import Any

from models.common.processing import DecodedVideo, run_video_processor
from models.common.sequences import MediaItem, grid_run
from models.contract.architecture import Architecture

MEDIA_KINDS = ("image", "video")


def process_video(video: DecodedVideo, processor: Any, architecture: Architecture) -> MediaItem:
    """One video to patches and one run a temporal patch. Raises ValueError where transformers refuses it."""
    vision = architecture.vision
    pixel_values, grid, indices = run_video_processor(processor, video)
    merge = vision.spatial_merge_size
    run = grid_run(architecture.tokens.video, 1, grid[1] // merge, grid[2] // merge)
    frame = f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"
    times = patch_timestamps(indices, video.fps, vision.temporal_patch_size)
    return MediaItem(
        kind="video",
        text="".join(f"<{time:.1f} seconds>{frame}" for time in times),
        runs=(run,) * grid[0],
        pixel_values=pixel_values,
        grid_thw=grid,
    )


def patch_timestamps(indices: list[int], fps: float, temporal_patch_size: int) -> list[float]:
    """Seconds of each temporal patch: midway between its first and last frame. The last frame is repeated to fill."""
    padded = indices + [indices[-1]] * (-len(indices) % temporal_patch_size)
    first, last = padded[::temporal_patch_size], padded[temporal_patch_size - 1 :: temporal_patch_size]
    return [(a / fps + b / fps) / 2 for a, b in zip(first, last, strict=True)]
