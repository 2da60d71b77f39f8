# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: media to runs with position ids.

A video's time axis follows a clock: `tokens_per_second` positions a second. transformers 5.17 takes the whole part
of the seconds between two temporal patches before it multiplies, and lets the next token follow the longer side of
the frame; both are kept, because parity with it is asserted.
"""

from typing import Any

from models.common.processing import DecodedVideo, run_video_processor
from models.common.sequences import MediaItem, grid_run
from models.contract.architecture import Architecture

MEDIA_KINDS = ("image", "video")


def process_video(video: DecodedVideo, processor: Any, architecture: Architecture) -> MediaItem:
    """One video to patches and its run. Raises ValueError where transformers refuses it."""
    vision = architecture.vision
    pixel_values, grid, indices = run_video_processor(processor, video)
    sampled_fps = len(indices) / video.frames.shape[0] * video.fps
    second_per_grid = vision.temporal_patch_size / sampled_fps
    step = (vision.tokens_per_second or 0) * int(second_per_grid)
    merge = vision.spatial_merge_size
    run = grid_run(architecture.tokens.video, grid[0], grid[1] // merge, grid[2] // merge, seconds_to_t=step)
    return MediaItem(
        kind="video", text=processor.video_token, runs=(run,), pixel_values=pixel_values, grid_thw=grid
    )
