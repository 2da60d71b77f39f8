# SPDX-License-Identifier: Apache-2.0
"""Loss on a fixed, ordered, held-out set, in the middle of a run."""

import itertools

from models.contract.errors import DataError
from models.datasets.loader import build_loader
from models.training.engine import mean_loss
from models.training.interruption import Watchdog
from models.training.progress import Run


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
    num_microbatches = max(1, recipe.train.eval_samples // per_call)
    parts = []
    for batch in itertools.islice(loader, num_microbatches):
        watchdog.beat()
        parts.append(run.engine.evaluate([batch]))
    everyone = ranks.exchange(parts)
    # How many packs the samples make is not known before.
    least = 1 if recipe.data.packing else num_microbatches
    found = [len(parts) for parts in everyone]
    if min(found) < least or len(set(found)) > 1:
        raise DataError(
            "the held-out set is exhausted",
            where=recipe.data.eval_dataset or recipe.data.dataset,
            expected=f"{least * per_call} samples",
            got=str(min(found) * per_call),
            fix="lower eval_samples or add held-out samples",
        )
    return mean_loss([sums for parts in everyone for sums in parts])
