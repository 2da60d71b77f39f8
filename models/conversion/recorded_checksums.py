# SPDX-License-Identifier: Apache-2.0
"""Checksums that a conversion leaves beside what it wrote, so that the folder can be checked without its source.

FOLDER/checksums.json   for each file the ranges of bytes that it consists of, and the hash of each range
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from models.contract.errors import ConfigError, WeightMappingError

CHECKSUMS_FILE = "checksums.json"
ALGORITHM = "xxh3_64"
"""Sees every accident at the speed of memory; no protection against somebody who means harm."""
READ_BYTES = 4 * 2**20
Range = tuple[int, int, str]
"""First byte, number of bytes, hash."""
Checksums = dict[str, list[Range]]
"""Ranges of each file, by its name in the folder; together they are the whole file."""


def digest_of(data: Any) -> str:
    """Hash of bytes."""
    return xxhash.xxh3_64_hexdigest(data)


def write_checksums(folder: Path, chunks: Mapping[str, list[Range]]) -> None:
    """Record the chunk files' hashes, and those of every other file in the folder."""
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in chunks)
    whole = {path.name: [(0, path.stat().st_size, digest_of(path.read_bytes()))] for path in others}
    text = json.dumps({"algorithm": ALGORITHM, "files": {**chunks, **whole}})
    (folder / CHECKSUMS_FILE).write_text(text + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> Checksums | None:
    """What a conversion recorded; None where there is no record (a checkpoint that training wrote).

    Raises:
        WeightMappingError: the record is broken, or of another algorithm.
    """
    file = folder / CHECKSUMS_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["algorithm"] != ALGORITHM:
            raise ValueError(f"algorithm {record['algorithm']!r}")
        return {
            str(name): [(int(start), int(length), str(digest)) for start, length, digest in ranges]
            for name, ranges in record["files"].items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightMappingError(
            "the recorded checksums cannot be read", where=str(file), expected=f"hashes by {ALGORITHM}",
            got=repr(error), fix="convert again; without the file the checkpoint is read unchecked",
        ) from None  # fmt: skip


def check_recorded(
    folder: Path,
    *,
    workers: int = 2,
    on_start: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Hash every file of a sharded checkpoint and compare with what the conversion recorded.

    Args:
        folder: One iteration's folder.
        workers: Threads.
        on_start: Told the bytes to read.
        advance: Told the bytes of every range.

    Returns: A JSON-able report with what a report page shows of a comparison (a record, one range of bytes, counts as
    a tensor): counts, `is_equal`, file and bytes of every range in `different`, files `missing` and `unexpected`.

    Raises:
        ConfigError: nothing was recorded.
        WeightMappingError: the record is broken.
    """
    recorded = read_checksums(folder)
    if recorded is None:
        raise ConfigError(
            "no checksums were recorded", where=str(folder), expected=CHECKSUMS_FILE,
            fix="compare with the checkpoint it was made from: convert verify LEFT RIGHT",
        )  # fmt: skip
    ranges = [(name, *entry) for name, entries in recorded.items() for entry in entries]
    on_start(sum(length for _, _, length, _ in ranges))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        problems = list(pool.map(partial(_problem, folder, advance), ranges))
    found = {path.name for path in folder.iterdir() if path.is_file()} - {CHECKSUMS_FILE}
    sizes = {name: sum(length for _, length, _ in entries) for name, entries in recorded.items()}
    missing = sorted(recorded.keys() - found)
    different = [problem for problem in problems if problem is not None and problem["name"] in found]
    different += [
        {"name": name, "detail": f"{size} bytes instead of {sizes[name]}"}
        for name in sorted(found & sizes.keys())
        if (size := (folder / name).stat().st_size) > sizes[name]
    ]
    unexpected = sorted(found - recorded.keys())
    return {
        "name": f"{folder.name} and its recorded checksums", "left": str(folder), "num_files": len(recorded),
        "is_equal": not (different or missing or unexpected),
        "num_tensors": len(ranges), "num_equal": problems.count(None), "num_bytes": sum(sizes.values()),
        "different": different, "missing": missing, "unexpected": unexpected,
    }  # fmt: skip


def _problem(
    folder: Path, advance: Callable[[int], None], entry: tuple[str, int, int, str]
) -> dict[str, str] | None:
    """What is wrong with one range of a file."""
    name, start, length, expected = entry
    digest, done = xxhash.xxh3_64(), 0
    try:
        with (folder / name).open("rb", buffering=0) as stream:
            while done < length:
                data = os.pread(stream.fileno(), min(READ_BYTES, length - done), start + done)
                if not data:
                    return {
                        "name": name,
                        "detail": f"ends at byte {start + done} instead of {start + length}",
                    }
                digest.update(data)
                done += len(data)
    except FileNotFoundError:
        return {"name": name, "detail": "is missing"}
    advance(length)
    if digest.hexdigest() == expected:
        return None
    return {"name": name, "detail": f"bytes {start} to {start + length - 1} are not those that were written"}
