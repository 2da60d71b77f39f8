# SPDX-License-Identifier: Apache-2.0
"""Loss on a fixed, ordered, held-out set, in the middle of a run."""

import itertools

from models.contract.errors import DataError
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.datasets.loader import build_loader
from models.datasets.shards import dataset_counts
from models.training.engine import mean_loss
from models.training.interruption import Watchdog
from models.training.progress import Run


def require_held_out(recipe: Recipe, site: Site) -> None:
    """Check before the first step that the held-out set has the samples that evaluations ask for.

    Raises:
        DataError: it is smaller.
    """
    if recipe.train.eval_interval is None:
        return
    name, per_call = _name(recipe), recipe.train.micro_batch_size * recipe.data_parallel_size
    expected, found = _num_microbatches(recipe) * per_call, dataset_counts(site.dataset(name), "val")
    if found < expected:
        raise _exhausted(name, expected, found)


def evaluate(run: Run, watchdog: Watchdog) -> float:
    """Held-out loss over the first `eval_samples` samples, the same ones at every call.

    Raises:
        DataError: the held-out set is smaller than what was asked for.
    """
    recipe, ranks = run.recipe, run.engine.ranks
    loader = build_loader(
        recipe, run.site, run.architecture,
        split="val", data_parallel_rank=ranks.dp_rank, data_parallel_size=ranks.dp_size,
    )  # fmt: skip
    per_call = recipe.train.micro_batch_size * ranks.dp_size
    num_microbatches = _num_microbatches(recipe)
    parts = []
    for batch in itertools.islice(loader, num_microbatches):
        watchdog.beat()
        parts.append(run.engine.evaluate([batch]))
    everyone = ranks.exchange(parts)
    # How many packs the samples make is not known before.
    least = 1 if recipe.data.packing else num_microbatches
    found = [len(parts) for parts in everyone]
    if min(found) < least or len(set(found)) > 1:
        raise _exhausted(_name(recipe), least * per_call, min(found) * per_call)
    return mean_loss([sums for parts in everyone for sums in parts])


def _num_microbatches(recipe: Recipe) -> int:
    """Of one data-parallel rank in one evaluation."""
    return max(1, recipe.train.eval_samples // (recipe.train.micro_batch_size * recipe.data_parallel_size))


def _name(recipe: Recipe) -> str:
    return recipe.data.eval_dataset or recipe.data.dataset


def _exhausted(name: str, expected: int, found: int) -> DataError:
    return DataError(
        "the held-out set is exhausted", where=f"{name}: val", expected=f"{expected} samples", got=str(found),
        fix="lower eval_samples or add held-out samples",
    )  # fmt: skip
