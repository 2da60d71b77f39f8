# SPDX-License-Identifier: Apache-2.0
"""Rules about rows of a stated shape (``[data.fixed_shapes]``): what divides, what fits, what has no effect there.

In each sample of a row the images come first, a text token before each, and text to the end follows. With 2 samples and
4 images::

    text image text image text text text | text image text image text text text
"""

from collections.abc import Iterator

from models.contract.architecture import VisionArchitecture
from models.contract.layout_problem import LayoutProblem
from models.contract.recipe import FIXED_SHAPES, DataSection, Recipe

KEYS_IN_FORCE = frozenset({"dataset", "seq_length", "packing", "fixed_shapes"})
"""Keys of ``[data]`` that say something about rows that are not read from anywhere."""


def merged_tokens(vision: VisionArchitecture, image_size: int) -> int:
    """Vision tokens of one square image, as the decoder sees them."""
    return (image_size // (vision.patch_size * vision.spatial_merge_size)) ** 2


def check_fixed_shapes(recipe: Recipe) -> Iterator[LayoutProblem]:
    """Every rule about stated shapes that the recipe breaks by itself."""
    data, shapes = recipe.data, recipe.data.fixed_shapes
    if (shapes is not None) != (data.dataset == FIXED_SHAPES):
        yield LayoutProblem(
            rule=f"the dataset is named '{FIXED_SHAPES}' where [data.fixed_shapes] states the rows, and only there",
            where="data.dataset", got=f"'{data.dataset}' with{'out' if shapes is None else ''} [data.fixed_shapes]",
            fix=f"set data.dataset = '{FIXED_SHAPES}', or leave the table out",
        )  # fmt: skip
    if shapes is None:
        return
    if data.packing != (shapes.samples > 1):
        yield LayoutProblem(
            rule="a row of more than one sample is a pack, and a row of one is none", where="data.packing",
            got=f"{data.packing} with {shapes.samples} sample(s)".lower(),
            fix=f"set it to {shapes.samples > 1}".lower(),
        )  # fmt: skip
    for what, total, key in (("seq_length", data.seq_length, "samples"), ("images", shapes.images, "images")):
        if total % shapes.samples:
            yield LayoutProblem(
                rule=f"{what} must divide over the samples of a row", where=f"data.fixed_shapes.{key}",
                got=f"{total} over {shapes.samples}", fix="choose a multiple of samples",
            )  # fmt: skip
    if recipe.train.micro_batch_size != 1 and not data.packing:
        yield LayoutProblem(
            rule="a stated row is a micro-batch", where="train.micro_batch_size",
            got=str(recipe.train.micro_batch_size), fix="set it to 1; data.seq_length says how much it holds",
        )  # fmt: skip
    if recipe.train.eval_interval is not None or recipe.train.eval_samples or data.eval_dataset is not None:
        yield LayoutProblem(
            rule="random rows teach nothing that a held-out set could tell", where="train.eval_interval",
            got=f"{recipe.train.eval_interval}, eval_samples = {recipe.train.eval_samples}, "
            f"eval_dataset = {data.eval_dataset}",
            fix="leave evaluation out",
        )  # fmt: skip
    yield from _without_effect(data)


def _without_effect(data: DataSection) -> Iterator[LayoutProblem]:
    for name, field in DataSection.model_fields.items():
        value = getattr(data, name)
        if name not in KEYS_IN_FORCE | {"eval_dataset"} and value != field.default:
            yield LayoutProblem(
                rule="nothing is read, so this has no effect", where=f"data.{name}",
                got=f"{value} with [data.fixed_shapes]", fix="leave it out",
            )  # fmt: skip


def check_fixed_images(vision: VisionArchitecture, recipe: Recipe) -> Iterator[LayoutProblem]:
    """Every rule about stated images that the recipe breaks for this vision tower."""
    shapes = recipe.data.fixed_shapes
    if shapes is None or not shapes.images:
        return
    multiple = vision.patch_size * vision.spatial_merge_size
    if shapes.image_size % multiple:
        yield LayoutProblem(
            rule="the side of an image must be a multiple of patch_size * spatial_merge_size",
            where="data.fixed_shapes.image_size", got=f"{shapes.image_size} and {multiple}",
            fix=f"use {max(1, round(shapes.image_size / multiple)) * multiple}",
        )  # fmt: skip
    merged, per_sample = merged_tokens(vision, shapes.image_size), -(-shapes.images // shapes.samples)
    room = recipe.data.seq_length // shapes.samples
    if per_sample * (merged + 1) >= room:
        yield LayoutProblem(
            rule="the images of a sample, a text token before each, must leave room for text",
            where="data.fixed_shapes.images",
            got=f"{per_sample} image(s) of {merged} tokens in a sample of {room} tokens",
            fix="use fewer or smaller images, or fewer samples",
        )  # fmt: skip
