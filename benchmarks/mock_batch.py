# SPDX-License-Identifier: Apache-2.0
"""Batches of exact, stated shapes: what a kernel benchmark runs on. Pixels and ids are random, sizes are real."""

from dataclasses import dataclass

import torch

from models.common.batch import IGNORED_LABEL, Batch
from models.contract.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class MockShape:
    """Shape of one micro-batch."""

    seq_length: int
    num_images: int = 0
    image_size: int = 448
    """Side of a square image in pixels; must be a multiple of patch_size * spatial_merge_size."""
    num_samples: int = 1
    """More than one: a packed row of equal samples."""


def mock_batch(architecture: Architecture, shape: MockShape, *, seed: int = 0, device: str = "cuda") -> Batch:
    """Make one micro-batch: images first in each sample, each after one text token; all text is supervised."""
    vision = architecture.vision
    generator = torch.Generator().manual_seed(seed)
    side = shape.image_size // vision.patch_size
    merged = (side // vision.spatial_merge_size) ** 2
    images_per_sample, rest = divmod(shape.num_images, shape.num_samples)
    sample_length = shape.seq_length // shape.num_samples
    if rest or images_per_sample * (merged + 1) >= sample_length:
        raise ValueError(f"{shape.num_images} images of {merged} merged tokens do not fit {shape}")
    s = sample_length * shape.num_samples
    is_vision = torch.zeros(shape.num_samples, sample_length, dtype=torch.bool)
    for image in range(images_per_sample):
        start = image * (merged + 1) + 1
        is_vision[:, start : start + merged] = True
    is_vision = is_vision.reshape(1, s)
    text_ids = torch.randint(0, min(architecture.text.vocab_size, 50_000), (1, s), generator=generator)
    labels = torch.where(is_vision, IGNORED_LABEL, text_ids.roll(-1, 1))
    positions = torch.arange(sample_length).repeat(shape.num_samples).expand(3, 1, s).contiguous()
    has_images = shape.num_images > 0
    num_patches = shape.num_images * side * side
    batch = Batch(
        input_ids=torch.where(is_vision, architecture.tokens.image, text_ids),
        labels=labels,
        position_ids=positions,
        pixel_values=torch.randn(num_patches, vision.patch_dim, generator=generator) if has_images else None,
        grid_thw=torch.tensor([[1, side, side]] * shape.num_images) if has_images else None,
        vision_positions=is_vision.flatten().nonzero().flatten() if has_images else None,
        cu_seqlens=torch.arange(0, s + 1, sample_length, dtype=torch.int32)
        if shape.num_samples > 1
        else None,
        max_seqlen=sample_length if shape.num_samples > 1 else 0,
        sample_keys=tuple(f"mock-{seed}-{index}" for index in range(shape.num_samples)),
        sample_lengths=(sample_length,) * shape.num_samples,
        num_real_tokens=s,
        num_supervised_tokens=int((labels != IGNORED_LABEL).sum()),
        num_images=shape.num_images,
    )
    return batch.to(device)
