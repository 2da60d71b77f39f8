# SPDX-License-Identifier: Apache-2.0
"""Write a dataset from a list of entries: in parallel, shard by shard, stoppable, and whole at the end.

Everything grows in ``.<name>.partial`` beside the output. A finished shard stays; a job that is started again writes
only what is missing. At the end the folder is indexed and renamed. The output is never written over.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from models.contract.errors import DataError
from models.datasets.sample import SampleRejected
from models.datasets.shards import SHARD_SIZE, RawSample, index_dataset, write_shard

logger = logging.getLogger(__name__)

Convert = Callable[[Any], RawSample]
PLAN_FILE, ABOUT_FILE, SKIPPED_FILE = "plan.json", "about.json", "skipped.jsonl"


@dataclass(slots=True)
class Summary:
    """What a job did."""

    written: Counter[str] = field(default_factory=Counter)
    """Samples of each split."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    reused_shards: int = 0

    @property
    def reasons(self) -> Counter[str]:
        """Skipped samples by reason."""
        return Counter(entry["reason"] for entry in self.skipped)


@dataclass(frozen=True, slots=True)
class _Task:
    path: Path
    split: str
    entries: Sequence[Any]
    convert: Convert


def split_by_key(
    entries: Sequence[Any], key_of: Callable[[Any], str], val_fraction: float
) -> dict[str, list[Any]]:
    """Share entries over train and val: those whose keys have the smallest hashes are held out, in any order."""
    digest_of = [hashlib.sha256(key_of(entry).encode()).digest() for entry in entries]
    count = round(len(entries) * val_fraction) or int(val_fraction > 0 and len(entries) > 1)
    limit = sorted(digest_of)[count] if count < len(entries) else b"\xff" * 33
    splits: dict[str, list[Any]] = {"train": [], "val": []}
    for entry, digest in zip(entries, digest_of, strict=True):
        splits["val" if digest < limit and count else "train"].append(entry)
    return {split: chosen for split, chosen in splits.items() if chosen}


def write_dataset(
    output: Path,
    splits: Mapping[str, Sequence[Any]],
    convert: Convert,
    *,
    about: dict[str, Any],
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    dataset: dict[str, Any] | None = None,
) -> Summary:
    """Convert entries and write them as an indexed dataset.

    Args:
        output: Folder that must not exist.
        splits: Split name → entries, in order.
        convert: Entry → sample; raises SampleRejected for one that is left out. Picklable.
        about: Where the data come from; stored, and compared when a stopped job is resumed.
        shard_size: Samples of a shard.
        workers: Processes.
        on_progress: Called with entries done and entries in all.
        dataset: Content of ``dataset.yaml``.

    Raises:
        DataError: the output exists, a stopped job had another plan, nothing was usable, or two keys are equal.
    """
    if output.exists():
        raise DataError(
            "output exists", where=str(output), expected="a folder that is not there yet",
            fix="choose another output, or remove it first",
        )  # fmt: skip
    partial = output.parent / f".{output.name}.partial"
    _claim(
        partial, {"about": about, "shard_size": shard_size, "splits": {k: len(v) for k, v in splits.items()}}
    )
    tasks = list(_plan(partial, splits, convert, shard_size))
    total = sum(len(task.entries) for task in tasks)
    summary, done = Summary(), 0
    todo = []
    for task in tasks:
        if task.path.exists():
            summary.reused_shards += 1
            done += len(task.entries)
        else:
            todo.append(task)
    on_progress(done, total)
    for task in _run(todo, workers):
        done += len(task.entries)
        on_progress(done, total)
    for task in tasks:
        report = json.loads(_report(task.path).read_text(encoding="utf-8"))
        summary.written[task.split] += report["written"]
        summary.skipped += report["skipped"]
    _finish(partial, output, summary, about, dataset, workers)
    return summary


def _claim(partial: Path, plan: dict[str, Any]) -> None:
    """Take the working folder, and refuse one that another job with another plan left behind."""
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / PLAN_FILE
    text = json.dumps(plan, sort_keys=True, indent=1, default=str)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise DataError(
            "a stopped job with other settings was here", where=str(partial),
            fix="run it again with the settings in its plan.json, or remove the folder",
        )  # fmt: skip
    file.write_text(text, encoding="utf-8")
    for torn in partial.glob("*.writing"):
        torn.unlink()


def _plan(
    partial: Path, splits: Mapping[str, Sequence[Any]], convert: Convert, shard_size: int
) -> Iterator[_Task]:
    for split, entries in splits.items():
        for number, start in enumerate(range(0, len(entries), shard_size)):
            path = partial / f"{split}-{number:06d}.tar"
            yield _Task(path, split, entries[start : start + shard_size], convert)


def _run(tasks: list[_Task], workers: int) -> Iterator[_Task]:
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            _write(task)
            yield task
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        for task, _ in zip(tasks, pool.map(_write, tasks), strict=True):
            yield task


def _write(task: _Task) -> None:
    skipped: list[dict[str, str]] = []
    written = 0

    def samples() -> Iterator[RawSample]:
        nonlocal written
        for entry in task.entries:
            try:
                sample = task.convert(entry)
            except SampleRejected as error:
                skipped.append({"entry": _name(entry), "reason": error.reason, "detail": error.detail})
                continue
            written += 1
            yield sample

    write_shard(task.path.with_suffix(".whole"), samples())
    report = json.dumps({"written": written, "skipped": skipped}, ensure_ascii=False)
    _report(task.path).write_text(report, encoding="utf-8")
    task.path.with_suffix(".whole").replace(task.path)  # last: a shard with its name has its report


def _report(path: Path) -> Path:
    return path.with_suffix(".report.json")


def _name(entry: Any) -> str:
    return (
        str(entry.get("id") or entry.get("image") or "")[:200]
        if isinstance(entry, dict)
        else str(entry)[:200]
    )


def _finish(
    partial: Path,
    output: Path,
    summary: Summary,
    about: dict[str, Any],
    dataset: dict[str, Any] | None,
    workers: int,
) -> None:
    if not sum(summary.written.values()):
        reasons = "; ".join(f"{reason}: {count}" for reason, count in summary.reasons.most_common(3))
        first = summary.skipped[0]
        raise DataError(
            "no usable sample", where=str(about.get("source", output)),
            got=f"{reasons}; first: {first['entry']}: {first['detail']}",
        )  # fmt: skip
    patterns = {split: f"{split}-.*" for split in summary.written if summary.written[split]}
    index_dataset(partial, patterns=patterns, dataset=dataset, workers=workers)
    about = {**about, "written": dict(summary.written), "skipped": dict(summary.reasons)}
    (partial / ABOUT_FILE).write_text(json.dumps(about, indent=1, ensure_ascii=False, default=str) + "\n")
    if summary.skipped:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in summary.skipped)
        (partial / SKIPPED_FILE).write_text(lines, encoding="utf-8")
    for report in partial.glob("*.report.json"):
        report.unlink()
    for empty in [path for path in partial.glob("*.tar") if path.stat().st_size <= 10240 and _is_empty(path)]:
        empty.unlink()
    (partial / PLAN_FILE).unlink()
    partial.rename(output)


def _is_empty(path: Path) -> bool:
    return not path.read_bytes().strip(b"\0")
