# SPDX-License-Identifier: Apache-2.0
"""Baselines: what a run is compared with. One JSON file a case and hardware class, kept in git.

    schema      the file: key, provenance, runs, calibration; its id is a hash of its content
    store       read, look up (strict to loose), write
    workflow    propose, accept, retire
    checks      lint, testable margins, ratchet cap
    review      show, and the change text of a proposal

There is no way to overwrite a baseline: a new one is proposed, reviewed and accepted, and what it replaces is kept.
"""

from harness.baselines.schema import Baseline, BaselineKey, BaselineRun, Calibration, baseline_of_records
from harness.baselines.store import Match, find_for_case, find_for_record, load_baseline

__all__ = [
    "Baseline",
    "BaselineKey",
    "BaselineRun",
    "Calibration",
    "Match",
    "baseline_of_records",
    "find_for_case",
    "find_for_record",
    "load_baseline",
]
