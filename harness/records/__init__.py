# SPDX-License-Identifier: Apache-2.0
"""Reads run directories and other stacks' logs into one :class:`RunRecord`.

What is wrong with a source is named in `problems`; a reader raises only when the path itself cannot be read.
"""

from harness.records.load import load_record
from harness.records.record import RunRecord

__all__ = ["RunRecord", "load_record"]
