# SPDX-License-Identifier: Apache-2.0
"""Write samples into WebDataset shards, and index them for megatron-energon.

A shard is written under another name, read back, and renamed: one that has its name is whole.
"""

import contextlib
import io
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
from ruamel.yaml import YAML

from models.contract.errors import DataError

logger = logging.getLogger(__name__)

META = ".nv-meta"
SHARD_SIZE = 10_000
"""Samples of a full shard, as the reference writes them."""
SAFE_KEY = re.compile(r"[^A-Za-z0-9_/-]+")
CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {"format": "chat"}}


@dataclass(frozen=True, slots=True)
class RawSample:
    """What goes into a shard: a key that is unique in the dataset, and its members by suffix."""

    key: str
    members: dict[str, bytes]


def safe_key(name: str) -> str:
    """Turn a name into a key: tar readers split at the first dot, and a key must never climb out of a folder."""
    return SAFE_KEY.sub("_", name).strip("/") or "_"


def write_shard(path: Path, samples: Iterable[RawSample]) -> int:
    """Write one shard under another name, read it back, and give it its name. Returns its samples.

    Raises:
        DataError: what was written reads back differently.
    """
    torn = path.with_name(path.name + ".writing")
    written: list[str] = []
    with tarfile.open(torn, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            for suffix, data in sample.members.items():
                entry = tarfile.TarInfo(f"{sample.key}.{suffix}")
                entry.size, entry.mode = len(data), 0o644
                tar.addfile(entry, io.BytesIO(data))
            written.append(sample.key)
    if list(iter_keys(torn)) != written:
        raise DataError(
            "a shard reads back differently", where=str(torn), fix="check the disk; then run again"
        )
    with torn.open("rb") as stream:
        os.fsync(stream.fileno())
    torn.replace(path)
    return len(written)


def iter_keys(path: Path) -> Iterator[str]:
    """Keys of a shard, in order.

    Raises:
        DataError: the tar is truncated or is none.
    """
    last = None
    for entry in iter_entries(path):
        found = None if skip_meta_re.match(entry.name) else split_name_re.match(entry.name)
        if found and found.group(1) != last:
            last = found.group(1)
            yield last


def iter_entries(path: Path) -> Iterator[tarfile.TarInfo]:
    """Regular members of a tar, checked to be whole and to stay inside it.

    Raises:
        DataError: truncated, no tar at all, or a member name that leaves the folder.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.offset_data + entry.size > size:
                    raise DataError("truncated tar", where=f"{path}: {entry.name}", fix="copy the file again")
                if entry.name.startswith("/") or ".." in entry.name.split("/"):
                    raise DataError(
                        "a tar member leaves its folder", where=str(path), got=entry.name,
                        fix="do not use this file, or rename the member",
                    )  # fmt: skip
                if entry.isreg():
                    yield entry
    except tarfile.TarError as error:
        raise DataError("truncated tar" if size else "empty file", where=str(path), got=str(error)) from None
    if not _has_end_marker(path, size):
        raise DataError("truncated tar", where=str(path), got="no end marker", fix="copy the file again")


def _has_end_marker(path: Path, size: int) -> bool:
    """A whole tar ends in two blocks of zeros."""
    with path.open("rb") as stream:
        stream.seek(max(0, size - 1024))
        return size >= 1024 and not stream.read(1024).strip(b"\0")


def index_dataset(
    folder: Path,
    *,
    patterns: dict[str, str] | None = None,
    ratios: dict[str, float] | None = None,
    shuffle_seed: int | None = 42,
    dataset: dict[str, Any] | None = None,
    shards: list[str] | None = None,
    workers: int = 1,
    skip_broken: bool = False,
) -> dict[str, int]:
    """Write ``.nv-meta`` and the tar indexes: what ``energon prepare`` asks for, from arguments.

    Args:
        folder: Dataset with its tars (found recursively), or those in `shards`.
        patterns: Split name → pattern of shard names.
        ratios: Split name → share of the shards, instead of patterns. Energon splits by shard.
        shuffle_seed: Order in which shards are given to splits by ratio; None keeps the order of names.
        dataset: Content of ``dataset.yaml``; default reads the sample format of this project.
        shards: Paths relative to `folder`.
        workers: Processes that read tars.
        skip_broken: Leave broken tars out instead of refusing.

    Returns:
        Samples of each shard that was indexed.

    Raises:
        DataError: no tars, broken tars, equal keys, or both or neither of patterns and ratios.
    """
    if (patterns is None) == (ratios is None):
        raise DataError("give either split patterns or split ratios", where=str(folder))
    names = shards or sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tar"))
    counts = _check_shards(folder, names, skip_broken=skip_broken)
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(redirect_stdout(io.StringIO()))
        try:
            BaseWebdatasetFactory.prepare_dataset(
                EPath(folder),
                list(counts),
                split_parts_patterns=list(patterns.items()) if patterns else None,
                split_parts_ratio=list(ratios.items()) if ratios else None,
                shuffle_seed=shuffle_seed,
                workers=min(workers, len(counts)),
            )
        except SystemExit:
            raise DataError(
                "indexing failed", where=str(folder), got=said.getvalue().strip()[-300:]
            ) from None
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    with (folder / META / "dataset.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(dataset or CRUDE, stream)
    return counts


def _check_shards(folder: Path, names: list[str], *, skip_broken: bool) -> dict[str, int]:
    counts: dict[str, int] = {}
    broken: list[str] = []
    owner: dict[str, str] = {}
    for name in names:
        try:
            keys = list(iter_keys(folder / name))
        except DataError as error:
            broken.append(f"{name} ({error.what})")
            continue
        for key in keys:
            if owner.setdefault(key, name) != name or len(keys) != len(set(keys)):
                raise DataError(
                    "two samples have the same key", where=f"{folder}: {owner[key]} and {name}", got=key,
                    fix="prepare the dataset again with unique ids",
                )  # fmt: skip
        if keys:
            counts[name] = len(keys)
    if broken and not skip_broken:
        raise DataError(
            f"{len(broken)} broken tar file(s)", where=str(folder), got="; ".join(broken[:5]),
            fix="copy them again, or leave them out with --skip-broken",
        )  # fmt: skip
    for name in broken:
        logger.warning("left out: %s", name)
    if not counts:
        raise DataError("no samples", where=str(folder), expected="*.tar with samples")
    return counts


def dataset_counts(folder: Path, split: str) -> int:
    """Samples of a split of an indexed dataset.

    Raises:
        DataError: the folder is not an indexed dataset, or has no such split.
    """
    if not (folder / META / "index.sqlite").is_file() and not (folder / META / ".info.json").is_file():
        raise DataError(
            "not a prepared dataset", where=str(folder), expected=f"{META}/.info.json and index.sqlite",
            got="no such folder" if not folder.exists() else "no index",
            fix="prepare it: qwen-harness data index, or one of the other data commands",
        )  # fmt: skip
    parts = YAML(typ="safe").load((folder / META / "split.yaml").read_text(encoding="utf-8"))["split_parts"]
    if not parts.get(split):
        named = ", ".join(name for name, shards in parts.items() if shards)
        raise DataError(
            f"the dataset has no {split!r} split", where=str(folder), got=f"samples in {named or 'no split'}",
            fix="prepare it with such a split, or name another dataset",
        )  # fmt: skip
    meta = WebdatasetMeta.from_config(path=EPath(folder), split_part=split, split_config="split.yaml")
    return sum(shard.count for shard in meta.shards)
