# SPDX-License-Identifier: Apache-2.0
"""What is in a dataset: counts, lengths, broken samples, and what a checkpoint makes of it."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from models.common.sequences import EncodedSample
from models.contract.families import load_architecture
from models.contract.recipe import DataSection
from models.datasets.chat import LossMask
from models.datasets.encoder import SampleEncoder, make_encoder
from models.datasets.energon import open_dataset, worker_config
from models.datasets.media import decode_medium
from models.datasets.sample import Sample, SampleRejected, parse_sample
from models.datasets.shards import dataset_counts

HISTOGRAM_BINS = 12


@dataclass(slots=True)
class Shown:
    """One sample kept for the contact sheet."""

    sample: Sample
    text: str
    """The rendered chat with one placeholder a medium, or the bare turns without a checkpoint."""
    tokens: list[tuple[str, bool]] = field(default_factory=list)
    """Decoded tokens before media are expanded, and whether they are learned."""
    length: int = 0


@dataclass(slots=True)
class Inspection:
    """Result of `inspect_dataset`."""

    folder: str
    split: str
    num_samples: int
    num_seen: int = 0
    media: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    broken: list[dict[str, str]] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """Name → one number a usable sample: characters, and with a checkpoint real, vision and supervised tokens."""
    shown: list[Shown] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """Broken samples by reason."""
        return Counter(entry["reason"] for entry in self.broken)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the samples to show."""
        return {
            "folder": self.folder, "split": self.split, "num_samples": self.num_samples, "num_seen": self.num_seen,
            "media": dict(self.media), "turns": {str(k): v for k, v in sorted(self.turns.items())},
            "broken": self.broken, "reasons": dict(self.reasons),
            "lengths": {name: _summary(values) for name, values in self.lengths.items()},
        }  # fmt: skip


def inspect_dataset(
    folder: Path,
    split: str,
    *,
    checkpoint: Path | None = None,
    seq_length: int = 8192,
    loss_mask: LossMask = "assistant",
    limit: int | None = None,
    keep: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Read every sample of a split, decode every medium, and count.

    Args:
        folder: Indexed dataset.
        split: Split of it.
        checkpoint: Count tokens as this checkpoint's processor makes them.
        seq_length: Samples longer than this are named as broken ("over length").
        loss_mask: Mask that is counted and shown.
        limit: Look at the first samples only.
        keep: Samples to keep for a contact sheet, spread over the split.
        on_progress: Called with samples done and samples in all.

    Raises:
        DataError: not an indexed dataset, or no such split.
    """
    total = min(dataset_counts(folder, split), limit or 1 << 62)
    reader = open_dataset(str(folder), split, worker_config(0, 1, 0, 0), training=False).reader()
    encoder = None
    if checkpoint is not None:
        data = DataSection(dataset=str(folder), seq_length=seq_length, loss_mask=loss_mask)
        encoder = make_encoder(data, load_architecture(checkpoint), checkpoint, cache_bytes=0)
    result = Inspection(str(folder), split, total)
    every = max(1, total // keep) if keep else 0
    for index in range(total):
        _look(
            result,
            reader[index],
            encoder,
            show=bool(every) and index % every == 0 and len(result.shown) < keep,
        )
        on_progress(index + 1, total)
    return result


def _look(result: Inspection, members: dict[str, Any], encoder: SampleEncoder | None, *, show: bool) -> None:
    result.num_seen += 1
    try:
        if "__unreadable__" in members:
            raise SampleRejected("unreadable tar", members["__unreadable__"])
        sample = parse_sample(members)
        for medium in sample.media:
            decode_medium(medium)
        encoded = encoder.encode(sample) if encoder is not None else None
    except SampleRejected as error:
        entry = {"file": str(members.get("__shard__", "")), "key": str(members["__key__"])}
        result.broken.append({**entry, "reason": error.reason, "detail": error.detail})
        return
    result.turns[len(sample.turns)] += 1
    result.media.update(medium.kind for medium in sample.media)
    if not sample.media:
        result.media["text only"] += 1
    _count(result.lengths, sample, encoded)
    if show:
        result.shown.append(_shown(sample, encoder, encoded))


def _count(lengths: dict[str, list[int]], sample: Sample, encoded: EncodedSample | None) -> None:
    numbers = {"characters": sum(len(turn.content) for turn in sample.turns)}
    if encoded is not None:
        numbers |= {
            "real tokens": encoded.length,
            "vision tokens": encoded.num_vision_tokens,
            "supervised tokens": int((encoded.labels != -100).sum()),
        }
    for name, value in numbers.items():
        lengths.setdefault(name, []).append(value)


def _shown(sample: Sample, encoder: SampleEncoder | None, encoded: EncodedSample | None) -> Shown:
    if encoder is None or encoded is None:
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in sample.turns)
        return Shown(sample, text)
    chat = encoder.tokenize(sample)
    pieces = [encoder.processor.tokenizer.decode([token]) for token in chat.ids.tolist()]
    return Shown(sample, chat.text, list(zip(pieces, chat.supervised.tolist(), strict=True)), encoded.length)


def _summary(values: Sequence[int]) -> dict[str, Any]:
    array = np.asarray(values)
    counts, edges = np.histogram(array, bins=HISTOGRAM_BINS)
    return {
        "min": int(array.min()), "median": float(np.median(array)), "mean": float(array.mean()),
        "p95": float(np.percentile(array, 95)), "max": int(array.max()), "sum": int(array.sum()),
        "histogram": {"counts": counts.tolist(), "edges": [round(float(edge), 1) for edge in edges]},
    }  # fmt: skip


def render_report(result: Inspection, console: Console) -> None:
    """Write the numbers for a person."""
    data = json.loads(json.dumps(result.to_dict()))
    usable = result.num_seen - len(result.broken)
    title = f"{result.folder} [{result.split}]: {result.num_seen} samples, {usable} usable"
    console.print(title, markup=False, soft_wrap=True)
    console.print("media: " + ", ".join(f"{name} {count}" for name, count in sorted(data["media"].items())))
    console.print("turns: " + ", ".join(f"{turns}: {count}" for turns, count in data["turns"].items()))
    table = Table("length", "min", "median", "mean", "p95", "max", "histogram", box=None, pad_edge=False)
    for name, row in data["lengths"].items():
        bars = sparkline(row["histogram"]["counts"])
        table.add_row(
            name,
            str(row["min"]),
            f"{row['median']:g}",
            f"{row['mean']:.1f}",
            f"{row['p95']:g}",
            str(row["max"]),
            bars,
        )
    console.print(table)
    if result.broken:
        console.print("broken: " + ", ".join(f"{reason}: {n}" for reason, n in result.reasons.most_common()))
        for entry in result.broken[:20]:
            line = f"  {entry['file']}: {entry['key']}: {entry['reason']} {entry['detail']}"
            console.print(line, markup=False, soft_wrap=True)


def sparkline(counts: Sequence[int]) -> str:
    """Counts as a row of blocks."""
    blocks = " ▁▂▃▄▅▆▇█"
    top = max(counts, default=0) or 1
    return "".join(blocks[-(-count * 8 // top)] for count in counts)
