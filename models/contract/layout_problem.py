# SPDX-License-Identifier: Apache-2.0
"""One rule that a recipe breaks: what planning prints and what a run is refused with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutProblem:
    """One rule that the recipe breaks for this model."""

    rule: str
    """The rule, in words."""
    where: str
    """Recipe key."""
    got: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule} (got {self.got}; {self.fix})"
