# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: media to runs with position ids, samples to batches.

A video's time axis follows a clock: `tokens_per_second` positions a second. transformers 5.17 takes the whole part
of the seconds between two temporal patches before it multiplies, and lets the next token follow the longer side of
the frame; both are kept, because parity with it is asserted.
"""

from typing import Any

from PIL import Image
from torch import Tensor

from models.common.batch import Batch
from models.common.processing import DecodedVideo, run_image_processor, run_video_processor
from models.common.sequences import EncodedSample, MediaItem, collate, encode_sequence, grid_run, pack
from models.contract.architecture import Architecture

MEDIA_KINDS = ("image", "video")


def process_image(image: Image.Image, processor: Any, architecture: Architecture) -> MediaItem:
    """One image to patches and its run. Raises ValueError where transformers refuses it."""
    pixel_values, grid = run_image_processor(processor, image)
    merge = architecture.vision.spatial_merge_size
    run = grid_run(architecture.tokens.image, grid[0], grid[1] // merge, grid[2] // merge)
    return MediaItem(
        kind="image", text=processor.image_token, runs=(run,), pixel_values=pixel_values, grid_thw=grid
    )


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


def encode_sample(
    key: str, ids: Tensor, supervised: Tensor, items: tuple[MediaItem, ...], architecture: Architecture
) -> EncodedSample:
    """Expand placeholders, give positions, shift labels. `ids` [n] int64, `supervised` [n] bool."""
    tokens = architecture.tokens
    return encode_sequence(key, ids, supervised, items, vision_tokens=(tokens.image, tokens.video))


def build_batch(
    samples: list[EncodedSample],
    *,
    pad_token: int,
    seq_length: int | None = None,
    packing: bool = False,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
) -> Batch:
    """One micro-batch: a row a sample, or all samples packed into one row.

    Args:
        samples: Encoded samples.
        pad_token: Id of padding.
        seq_length: Padded length; None follows from the samples.
        packing: One row with `cu_seqlens`.
        multiple_of: Rounds a length that follows from the samples.
        sequence_multiple_of: Rounds every sample of a pack (context parallelism).

    Raises:
        ShapeError: the samples do not fit.
    """
    if packing:
        return pack(
            samples, pad_token=pad_token, seq_length=seq_length, multiple_of=multiple_of,
            sequence_multiple_of=sequence_multiple_of,
        )  # fmt: skip
    return collate(samples, pad_token=pad_token, seq_length=seq_length, multiple_of=multiple_of)
