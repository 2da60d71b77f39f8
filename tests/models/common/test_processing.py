# SPDX-License-Identifier: Apache-2.0
"""The named preprocessing modes against their definitions, worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.common.processing import (
    DecodedVideo,
    load_processor,
    process_image,
    run_image_processor,
    run_video_processor,
)
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.families import load_architecture
from models.contract.tiny_config import tiny_config
from models.conversion.tiny_processor import write_processor_files

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_omni")
IMAGENET = (np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375]))
"""Means and deviations of red, green, blue on the scale 0..255."""


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: Any, tmp_path_factory: Any) -> tuple[Path, Architecture]:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(tiny_config(request.param)), encoding="utf-8")
    write_processor_files(folder, request.param)
    return folder, load_architecture(folder)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def flat(colour: tuple[int, int, int], height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def expected_grid(height: int, width: int, *, factor: int, patch: int, most: int) -> tuple[int, int]:
    """Patches down and across: sides to the nearest multiple of `factor`, then shrunk until `most` patches do."""
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > most * patch**2:
        shrink = math.sqrt(height * width / (most * patch**2))
        rows, columns = (math.floor(side / shrink / factor) * factor for side in (height, width))
    return rows // patch, columns // patch


def test_reference_mode_normalises_with_imagenet_statistics(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    vision = architecture.vision
    side = 4 * vision.patch_size * vision.spatial_merge_size
    colour = (200, 30, 90)
    item = process_image(
        flat(colour, side, side), load_processor(folder, vision, preprocessing="reference"), architecture
    )
    assert item.pixel_values is not None
    values = item.pixel_values.reshape(-1, 3, vision.temporal_patch_size * vision.patch_size**2)
    wanted = torch.tensor((np.array(colour) - IMAGENET[0]) / IMAGENET[1], dtype=torch.float32)
    torch.testing.assert_close(values, wanted[:, None].expand_as(values), atol=2e-6, rtol=0)  # measured 2e-7


def test_reference_mode_holds_at_most_1280_vision_tokens(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    vision = architecture.vision
    processor = load_processor(folder, vision, preprocessing="reference")
    factor = vision.patch_size * vision.spatial_merge_size
    for blocks in ((50, 40), (200, 30), (20, 20)):
        height, width = (count * factor for count in blocks)
        _, grid = run_image_processor(processor, noise(height, width))
        assert grid[1:] == expected_grid(height, width, factor=factor, patch=vision.patch_size, most=5120)
        assert grid[1] * grid[2] // vision.spatial_merge_size**2 <= 1280
    assert (grid[1], grid[2]) == (40, 40)  # the last one is below the cap and keeps its size


def test_modes_differ_in_statistics_and_bounds_alone(checkpoint: tuple[Path, Architecture]) -> None:
    """Taking off each mode's own normalisation leaves the same picture."""
    folder, architecture = checkpoint
    vision = architecture.vision
    side = 4 * vision.patch_size * vision.spatial_merge_size
    bounds = {"min_pixels": side**2, "max_pixels": side**2}
    pictures = []
    for mode in ("hf", "reference"):
        processor = load_processor(folder, vision, preprocessing=mode, **bounds)  # type: ignore[arg-type]
        values, _ = run_image_processor(processor, noise(side, side))
        mean, std = (
            torch.tensor(numbers)
            for numbers in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )
        patches = values.reshape(-1, 3, vision.temporal_patch_size * vision.patch_size**2)
        pictures.append(patches * std[:, None] + mean[:, None])
    torch.testing.assert_close(pictures[0], pictures[1], atol=2e-6, rtol=0)
    assert not torch.allclose(std, torch.tensor([0.5, 0.5, 0.5]))


@pytest.mark.parametrize("is_sampled", [False, True])
def test_video_of_one_frame_is_refused(checkpoint: tuple[Path, Architecture], is_sampled: bool) -> None:
    folder, architecture = checkpoint
    one = DecodedVideo(np.zeros((1, 56, 56, 3), np.uint8), 2.0, is_sampled)
    with pytest.raises(ValueError, match=r"1 frame\(s\), needs 2: give it as an image"):
        run_video_processor(load_processor(folder, architecture.vision), one)


def test_image_with_an_aspect_ratio_over_200_is_refused(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    with pytest.raises(ValueError, match="aspect ratio"):
        process_image(noise(10, 2010), load_processor(folder, architecture.vision), architecture)


def test_contradicting_bounds_are_refused(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    with pytest.raises(ConfigError, match="min_pixels is above max_pixels"):
        load_processor(folder, architecture.vision, min_pixels=9000, max_pixels=8000)
