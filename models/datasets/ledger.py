# SPDX-License-Identifier: Apache-2.0
"""Which samples a run could not use, and when that is too much."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from models.contract.errors import DataError
from models.datasets.encoder import Rejection

logger = logging.getLogger(__name__)

PATIENCE = 32
"""Samples that may be rejected from the start before a dataset counts as wholly rejected."""
MIN_READ = 200
"""Samples read before the skipped share is judged; a smaller dataset is judged after one pass."""


@dataclass(slots=True)
class SkipLedger:
    """Which samples were skipped, and when that is too much.

    Raises:
        DataError: from `reject`, when nothing is usable or the share passes `max_fraction`.
    """

    folder: str
    num_samples: int
    max_fraction: float
    num_read: int = 0
    num_skipped: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    """Every skipped sample once: file, key, reason, detail."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Skips by reason."""
    _known: set[tuple[str, ...]] = field(default_factory=set)

    def accept(self, count: int = 1) -> None:
        """Count used samples."""
        self.num_read += count

    def reject(self, rejection: Rejection) -> None:
        """Count a skipped sample, and judge."""
        self.num_read += 1
        self.num_skipped += 1
        self.reasons[rejection.reason] += 1
        entry = rejection.to_dict()
        if tuple(entry.values()) not in self._known:
            self._known.add(tuple(entry.values()))
            self.samples.append(entry)
            logger.warning(
                "skipped %s in %s: %s %s", entry["key"], entry["file"], entry["reason"], entry["detail"]
            )
        if rejection.stops_the_run:
            raise DataError(
                f"unusable sample: {rejection.reason}", where=f"{self.folder}: {rejection.file}: {rejection.key}",
                got=rejection.detail, fix='raise data.seq_length, or set data.over_length to "skip" or "truncate"',
            )  # fmt: skip
        self._judge()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`, see :meth:`state`."""
        self.num_read, self.num_skipped = state["num_read"], state["num_skipped"]
        self.samples, self.reasons = list(state["skipped"]), Counter(state["reasons"])
        self._known = {tuple(entry.values()) for entry in self.samples}

    def state(self) -> dict[str, Any]:
        """The counts as plain JSON."""
        return {
            "num_read": self.num_read, "num_skipped": self.num_skipped, "skipped": self.samples,
            "reasons": dict(self.reasons),
        }  # fmt: skip

    def _judge(self) -> None:
        nothing_usable = self.num_skipped == self.num_read
        if nothing_usable and self.num_read >= min(PATIENCE, self.num_samples):
            raise self._error(f"no usable sample among the first {self.num_read}", "at least one")
        limit = self.max_fraction
        judged = self.num_read >= min(MIN_READ, self.num_samples)
        if judged and self.num_skipped > limit * self.num_read:
            raise self._error(
                f"too many samples skipped: {self.num_skipped} of {self.num_read}", f"at most {limit:.1%}"
            )

    def _error(self, what: str, expected: str) -> DataError:
        first = self.samples[0]
        return DataError(
            what, where=self.folder, expected=expected,
            got="; ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common(3))
            + f"; first: {first['file']}: {first['key']}: {first['detail'] or first['reason']}",
            fix="look at it with `qwen-harness data inspect`, repair it, or raise data.max_skipped_fraction",
        )  # fmt: skip
