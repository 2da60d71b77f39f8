# SPDX-License-Identifier: Apache-2.0
"""The checkpoint's own processor: loaded from its folder, and set to one of two named preprocessing modes.

`hf` is what transformers does with this checkpoint. `reference` is what the published Qwen2.5-VL-7B baseline was
trained with: ImageNet statistics for every model and at most 1,280 merged vision tokens an image.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoProcessor

from models.common.sequences import MediaItem, grid_run
from models.contract.architecture import Architecture, VisionArchitecture
from models.contract.errors import ConfigError

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
REFERENCE_PATCHES = (16, 5120)
"""Fewest and most patches of an image in the reference: 4 to 1,280 merged vision tokens."""
DEFAULT_VIDEO_FPS = 2.0
"""Frames taken per second of a video file where the checkpoint's processor does not say."""


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """Frames of a video.

    `frames` is [n, h, w, 3] uint8. `fps` belongs to these frames. `is_sampled` says that the frames were picked
    when the dataset was made, and are to be used as they are.
    """

    frames: np.ndarray
    fps: float
    is_sampled: bool


def load_processor(
    folder: Path,
    vision: VisionArchitecture,
    *,
    preprocessing: Literal["hf", "reference"] = "hf",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Any:
    """Load tokenizer, image, video and audio processors of a checkpoint folder.

    Args:
        folder: HF checkpoint folder.
        vision: Its vision sizes.
        preprocessing: Named mode, see above.
        min_pixels: Fewest pixels after resizing; None leaves what the mode says. For images, and for videos in the
            sense of the video processor: a frame (Qwen2.5-VL, Qwen3-Omni) or the whole video (Qwen3-VL).
        max_pixels: Most pixels, likewise.

    Raises:
        ConfigError: the folder has no usable processor, or the bounds contradict each other.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the checkpoint has no usable processor", where=str(folder),
            expected="preprocessor_config.json, tokenizer files and a chat template", got=str(error)[:300],
            fix="copy the processor files from the model's original folder",
        ) from None  # fmt: skip
    images, videos = processor.image_processor, processor.video_processor
    # What a call of the whole processor would pass on: Qwen3-Omni's overrides the size of its video processor.
    called_with = processor.valid_processor_kwargs._defaults.get("videos_kwargs", {})
    bounds = {"image": _edges(images.size), "video": _edges(called_with.get("size", videos.size))}
    if preprocessing == "reference":
        lower, upper = (count * vision.patch_size**2 for count in REFERENCE_PATCHES)
        bounds = {"image": (lower, upper), "video": (lower, upper)}
        for part in (images, videos):
            part.image_mean, part.image_std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    for part, (lower, upper) in zip((images, videos), bounds.values(), strict=True):
        lower, upper = min_pixels or lower, max_pixels or upper
        if lower > upper:
            raise ConfigError(
                "min_pixels is above max_pixels", where=f"[data] with {folder}",
                got=f"min_pixels {lower}, max_pixels {upper}", fix="set both, or neither",
            )  # fmt: skip
        part.size = type(part.size)(shortest_edge=lower, longest_edge=upper)
    if videos.cap_pixels_per_frame is None:  # transformers 5.17 asks for a choice; this one is its behaviour
        videos.cap_pixels_per_frame = False
    return processor


def _edges(size: Any) -> tuple[int, int]:
    return size["shortest_edge"], size["longest_edge"]


def run_image_processor(processor: Any, image: Any) -> tuple[Any, tuple[int, int, int]]:
    """Patches [p, c] float32 and grid of one RGB image.

    Raises:
        ValueError: the processor refuses the image (transformers' own wording).
    """
    out = processor.image_processor(images=[image], return_tensors="pt")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


def process_image(image: Any, processor: Any, architecture: Architecture) -> MediaItem:
    """One RGB image to patches and its run.

    Raises:
        ValueError: transformers refuses the image.
    """
    pixel_values, grid = run_image_processor(processor, image)
    merge = architecture.vision.spatial_merge_size
    run = grid_run(architecture.tokens.image, grid[0], grid[1] // merge, grid[2] // merge)
    return MediaItem(
        kind="image", text=processor.image_token, runs=(run,), pixel_values=pixel_values, grid_thw=grid
    )


def run_video_processor(processor: Any, video: DecodedVideo) -> tuple[Any, tuple[int, int, int], list[int]]:
    """Patches [p, c] float32, grid, and the indices of the frames that were used.

    Raises:
        ValueError: the processor refuses the video (transformers' own wording).
    """
    videos = processor.video_processor
    count = video.frames.shape[0]
    indices = np.arange(count)
    if count < videos.temporal_patch_size:
        raise ValueError(
            f"a video of {count} frame(s), needs {videos.temporal_patch_size}: give it as an image"
        )
    if not video.is_sampled:
        metadata = _metadata(video)
        fps = None if videos.num_frames is not None else (videos.fps or DEFAULT_VIDEO_FPS)
        indices = np.asarray(videos.sample_frames(metadata, fps=fps, num_frames=videos.num_frames))
    out = videos(
        videos=[video.frames[indices]], do_sample_frames=False, return_tensors="pt", return_metadata=False
    )
    return out["pixel_values_videos"], tuple(out["video_grid_thw"][0].tolist()), indices.tolist()


def _metadata(video: DecodedVideo) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(total_num_frames=video.frames.shape[0], fps=video.fps)
