# SPDX-License-Identifier: Apache-2.0
"""What `--checkpoint` names: a Hugging Face folder, a Megatron checkpoint, or the run directory that holds one."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from models.contract.errors import ConfigError
from models.contract.record import RUN_FILE, read_run_info
from models.contract.site import Site
from models.conversion.dcp_folder import METADATA_FILE, TRACKER_FILE, find_iteration

DISTRIBUTED_FILES = (METADATA_FILE, TRACKER_FILE)
"""One of them marks a torch_dist folder or the folder above its iterations."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where weights, sizes and the tokenizer come from."""

    hf_folder: Path
    """Config, tokenizer and processor; the weights too when `megatron_folder` is None."""
    megatron_folder: Path | None = None
    """torch_dist folder with the weights."""

    @property
    def weights_folder(self) -> Path:
        """The folder the weights are in."""
        return self.megatron_folder or self.hf_folder


def resolve_checkpoint(path: Path, *, hf_folder: Path | None, site: Site) -> CheckpointSource:
    """Find out what a path is.

    Args:
        path: HF folder; torch_dist folder (with or without an ``iter_…`` or ``release`` level); run directory.
        hf_folder: Where a Megatron checkpoint's config and tokenizer are, when neither it nor its run says so.
        site: Finds the checkpoint that a run's recipe names.

    Raises:
        ConfigError: the path is none of these, or no HF folder belongs to it.
        WeightMappingError: a tracker file names an iteration that is not there.
    """
    if not path.is_dir():
        raise ConfigError(
            "checkpoint folder not found",
            where=str(path),
            fix="check the path, or `checkpoints` in site.toml",
        )
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return CheckpointSource(path)
    if not any(
        (place / name).exists() for place in (path, path / "checkpoints") for name in DISTRIBUTED_FILES
    ):
        raise ConfigError(
            "not a checkpoint",
            where=str(path),
            expected="a Hugging Face folder with weights, a torch_dist folder, or a run directory",
            got=", ".join(sorted(item.name for item in path.iterdir())[:6]) or "an empty folder",
        )
    megatron = find_iteration(path)
    return CheckpointSource(_hf_folder_of(path, megatron, hf_folder, site), megatron)


def _hf_folder_of(path: Path, megatron: Path, given: Path | None, site: Site) -> Path:
    if given is not None:
        return given
    for folder in (megatron, megatron.parent, path):
        if (folder / "config.json").is_file():
            return folder
    for folder in (megatron, *megatron.parents[:3]):
        if (folder / RUN_FILE).is_file():
            return site.checkpoint(str(read_run_info(folder).recipe["model"]["checkpoint"]))
    raise ConfigError(
        "no config and tokenizer belong to this Megatron checkpoint",
        where=str(megatron),
        expected="a run directory with run.json, or config.json beside the weights",
        fix="name the original Hugging Face folder with --hf-folder",
    )


def fingerprint(source: CheckpointSource) -> str:
    """16 hex digits that change with the weights: names, sizes and edge bytes of the weight files, and the config."""
    digest = hashlib.sha256((source.hf_folder / "config.json").read_bytes())
    for file in sorted(source.weights_folder.rglob("*")):
        if file.suffix not in {".safetensors", ".distcp"}:
            continue
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(size // 16, 1)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
