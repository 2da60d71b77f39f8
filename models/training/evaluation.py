# SPDX-License-Identifier: Apache-2.0
"""Loss on a fixed, ordered, held-out set, in the middle of a run."""

import itertools

from models.contract.errors import DataError
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.datasets.loader import build_loader
from models.datasets.shards import dataset_counts
from models.training.engine import LossSums, mean_loss
from models.training.interruption import Watchdog
from models.training.progress import Run


def require_held_out(recipe: Recipe, site: Site) -> None:
    """Check before the first step that the held-out set has the samples that evaluations ask for.

    Raises:
        DataError: it is smaller.
    """
    if recipe.train.eval_interval is None:
        return
    name = _name(recipe)
    expected, found = recipe.train.eval_samples, dataset_counts(site.dataset(name), "val")
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
    parts: list[LossSums] = []
    num_done, num_wanted = 0, recipe.num_eval_microbatches
    while num_done < num_wanted:
        watchdog.beat()
        # A pipeline takes as many at a time as it has stages: its virtual stages need them all.
        size = min(ranks.layout["pp"], num_wanted - num_done)
        batches = list(itertools.islice(loader, size))
        found = min(ranks.exchange(len(batches)))
        if found < size:  # on any rank: those that share experts or weights go together or not at all
            num_samples = (num_done + found) * recipe.train.micro_batch_size * ranks.dp_size
            raise _exhausted(_name(recipe), recipe.train.eval_samples, num_samples)
        parts.append(run.engine.evaluate(batches))
        num_done += size
    return mean_loss([sums for parts in ranks.exchange(parts) for sums in parts])


def _name(recipe: Recipe) -> str:
    return recipe.data.eval_dataset or recipe.data.dataset


def _exhausted(name: str, expected: int, found: int) -> DataError:
    return DataError(
        "the held-out set is exhausted", where=f"{name}: val", expected=f"{expected} samples", got=str(found),
        fix="lower eval_samples or add held-out samples",
    )  # fmt: skip
