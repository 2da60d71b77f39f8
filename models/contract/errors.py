# SPDX-License-Identifier: Apache-2.0
"""Errors that say what happened, where, what was expected and how to fix it.

HarnessError
├── ConfigError            a recipe, policy, site or option is wrong: edit it
├── BaselineError          a baseline is missing, malformed or was edited: propose a new one
├── EnvironmentMismatch    the machine is not the one that was asked for: move or change the marker
├── WeightMappingError     a checkpoint does not fit the table: wrong file or wrong family
├── ShapeError             tensors that belong together do not: look at the sample it names
├── DataError              a dataset or sample cannot be used: repair or drop it
└── RunError               a run failed or left something unreadable: read its log
"""

from typing import Any, Self


class HarnessError(Exception):
    """An error a person can act on.

    Args:
        what: What happened, one line.
        where: File and key, weight name, case id or rank.
        expected: What would have been right.
        got: What was found instead.
        fix: What to do about it.
    """

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", got: str = "", fix: str = ""
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        rows = [("where", where), ("expected", expected), ("got", got), ("fix", fix)]
        text = "".join(f"\n  {name + ':':<10}{value}" for name, value in rows if value)
        super().__init__(f"{type(self).__name__}: {what}{text}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive a process pool: keyword-only arguments break the default pickling."""
        fields = {"where": self.where, "expected": self.expected, "got": self.got, "fix": self.fix}
        return (_rebuild, (type(self), self.what, fields, getattr(self, "__notes__", [])))

    def with_note(self, note: str) -> Self:
        """Add a line of context on the way up, without re-wording the error."""
        self.add_note(note)
        return self


class ConfigError(HarnessError):
    """A recipe, policy, site file or option is wrong."""


class BaselineError(HarnessError):
    """A baseline is missing, malformed, or not what it claims."""


class EnvironmentMismatch(HarnessError):  # noqa: N818 - the name the verdict uses
    """The machine is not the one that was asked for."""


class WeightMappingError(HarnessError):
    """A checkpoint and a weight table do not fit."""


class ShapeError(HarnessError):
    """Tensors that belong together have shapes that do not."""


class DataError(HarnessError):
    """A dataset or one of its samples cannot be used."""


class RunError(HarnessError):
    """A run failed, or what it left cannot be read."""


def _rebuild(cls: type[HarnessError], what: str, fields: dict[str, str], notes: list[str]) -> HarnessError:
    error = cls(what, **fields)
    for note in notes:
        error.add_note(note)
    return error
