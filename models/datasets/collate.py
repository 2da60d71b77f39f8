# SPDX-License-Identifier: Apache-2.0
"""How encoded samples become a micro-batch under a recipe."""

from collections.abc import Callable, Sequence

from models.common.batch import Batch
from models.common.batching import build_batch
from models.common.sequences import EncodedSample
from models.contract.errors import ConfigError
from models.contract.layout import sequence_multiple
from models.contract.recipe import Recipe
from models.datasets.encoder import SampleEncoder

Collate = Callable[[Sequence[EncodedSample]], Batch]


def make_collate(recipe: Recipe, encoder: SampleEncoder, *, packing: bool) -> Collate:
    """Padded length, packing, and what the layout needs to divide.

    Raises:
        ConfigError: the sequence length does not divide over the layout.
    """
    parallel = recipe.parallel
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    multiple = sequence_multiple(recipe)
    length = recipe.data.seq_length if recipe.data.padding == "max_length" else None
    if length is not None and length % multiple:
        raise ConfigError(
            "seq_length does not divide over the layout", where="[data] seq_length",
            expected=f"a multiple of {multiple}", got=str(length),
        )  # fmt: skip

    def collate(samples: Sequence[EncodedSample]) -> Batch:
        return build_batch(
            samples, pad_token=encoder.pad_token, seq_length=length, packing=packing,
            multiple_of=multiple * (16 if recipe.precision.fp8 else 1),
            sequence_multiple_of=context if packing else 1,
        )  # fmt: skip

    return collate
