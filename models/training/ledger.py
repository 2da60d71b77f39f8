# SPDX-License-Identifier: Apache-2.0
"""Which samples each step consumed: digests that catch a resume that skips or repeats one.

A step's keys are sorted: its gradient is a sum, and how ranks and micro-batches share the samples depends on the
layout. The order of the steps counts.
"""

import hashlib
import json
from collections.abc import Iterable

DIGEST_HEX_DIGITS = 16


def step_digest(keys: Iterable[str]) -> str:
    """First 16 hex digits of the sha256 over the keys of one step, sorted, as a JSON list."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:DIGEST_HEX_DIGITS]


class Ledger:
    """Digest of every step so far, and one digest over all of them."""

    def __init__(self, steps: Iterable[str] = ()) -> None:
        self.steps: list[str] = []
        self._sha = hashlib.sha256()
        for digest in steps:
            self._append(digest)

    def add(self, keys: Iterable[str]) -> str:
        """Record one step; returns its digest."""
        digest = step_digest(keys)
        self._append(digest)
        return digest

    def digest(self) -> str:
        """sha256 over all steps so far, hexadecimal."""
        return self._sha.hexdigest()

    def _append(self, digest: str) -> None:
        self.steps.append(digest)
        self._sha.update(digest.encode())
