# SPDX-License-Identifier: Apache-2.0
"""What the data commands share: options, the progress bar, writing and reporting."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.contract.errors import DataError

console = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Dataset folder to make; must not exist.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Samples of a shard.")]
ValFraction = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share held out for validation, by a hash of the key.")
]
Verify = Annotated[
    Literal["none", "header", "decode"],
    typer.Option(help="How closely images are looked at; bad ones are left out."),
]


def write_entries(
    output: Path,
    entries: list[Any],
    convert: Any,
    about: dict[str, Any],
    val_fraction: float,
    shard_size: int,
    workers: int,
    *,
    dataset: dict[str, Any] | None = None,
    key_of: Any = lambda entry: entry["id"],
) -> None:
    """Share entries over splits, convert and write them, and say what came of it."""
    from models.datasets.prepare.job import split_by_key, write_dataset

    splits = split_by_key(entries, key_of, val_fraction)
    with progress("writing") as tick:
        summary = write_dataset(
            output, splits, convert, about={**about, "val_fraction": val_fraction}, shard_size=shard_size,
            workers=workers, on_progress=tick, dataset=dataset,
        )  # fmt: skip
    report(output, summary)


def report(output: Path, summary: Any) -> None:
    """Say what was written and what was left out."""
    written = ", ".join(f"{count} {split}" for split, count in summary.written.items())
    reused = f", {summary.reused_shards} shards from before" if summary.reused_shards else ""
    console.print(f"wrote {written} to {output}{reused}")
    if summary.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in summary.reasons.most_common())
        console.print(f"left out {len(summary.skipped)} ({reasons}); see {output / 'skipped.jsonl'}")


class progress:  # noqa: N801 - used as a function
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self.bar = Progress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def parse_ratios(text: str) -> dict[str, float]:
    """Shares of train, val and test from a text such as 9,1,0. Raises DataError."""
    try:
        parts = [float(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts, default=-1) < 0 or sum(parts) <= 0:
        raise DataError("bad split", expected="shares of train, val and test, such as 9,1,0", got=text)
    return dict(zip(("train", "val", "test"), parts, strict=False))


def parse_pair(text: str) -> tuple[str, str]:
    """NAME=VALUE in two. Raises DataError."""
    name, found, value = text.partition("=")
    if not found or not name or not value:
        raise DataError("bad option", expected="NAME=VALUE", got=text)
    return name, value
