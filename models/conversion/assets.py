# SPDX-License-Identifier: Apache-2.0
"""The small files of a checkpoint folder: config, tokenizer, templates, licence. Copied, never written anew."""

import shutil
from pathlib import Path

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".onnx",
    ".distcp",
)


def asset_files(folder: Path) -> list[Path]:
    """Files of a checkpoint folder that are not weights, the shard index included; no hidden folders."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in WEIGHT_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
    )


def copy_assets(source: Path, target: Path, *, leave_out: frozenset[str] = frozenset()) -> None:
    """Copy every asset byte for byte, except files of these names."""
    for name in asset_files(source):
        if name.name in leave_out:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
