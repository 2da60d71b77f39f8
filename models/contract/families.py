# SPDX-License-Identifier: Apache-2.0
"""Which family a checkpoint belongs to, and where that family's modules are. Torch-free."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from models.contract.architecture import FAMILIES, Architecture, Family
from models.contract.errors import ConfigError

FAMILY_OF_MODEL_TYPE: dict[str, Family] = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_omni_moe": "qwen3_omni",
}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a HF checkpoint folder.

    Raises:
        ConfigError: the folder or the file is missing, or the file is not JSON (half-written).
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(
            "checkpoint folder not found",
            where=str(folder),
            expected="a Hugging Face checkpoint folder",
            fix="check the path, or `checkpoints` in site.toml",
        )
    if not file.is_file():
        raise ConfigError(
            "checkpoint has no config.json", where=str(folder), fix="download the checkpoint again"
        )
    try:
        hf_config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config.json is not valid JSON", where=str(file), got=str(error)) from None
    if not isinstance(hf_config, dict):
        raise ConfigError(
            "config.json is not an object", where=str(file), expected="{…}", got=f"{hf_config!r:.80}"
        )
    return hf_config


def detect_family(hf_config: dict[str, Any], *, where: str = "config.json") -> Family:
    """Family of a HF config, by its ``model_type``. Raises ConfigError for an unknown architecture."""
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILY_OF_MODEL_TYPE:
        raise ConfigError(
            "unknown architecture",
            where=where,
            expected=f"model_type one of {', '.join(FAMILY_OF_MODEL_TYPE)}",
            got=f"model_type = {model_type!r}",
            fix="use a supported checkpoint, or add a family as CONTRIBUTING.md describes",
        )
    return FAMILY_OF_MODEL_TYPE[model_type]


def family_part(family: Family, part: Literal["config", "model", "weights", "data"]) -> ModuleType:
    """Import ``models.<family>.<part>``."""
    if family not in FAMILIES:
        raise ConfigError("unknown family", expected=", ".join(FAMILIES), got=family)
    return importlib.import_module(f"models.{family}.{part}")


PUBLISHED = Path(__file__).parent / "published"
"""One small ``config.json`` for each published size, for random-weight runs and for planning."""


def published_names() -> list[str]:
    """Every published size, such as ``qwen3_vl_30b_a3b``."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def published_config(name: str) -> dict[str, Any]:
    """HF config of a published size, such as ``qwen3_vl_30b_a3b``. Raises ConfigError with the known names."""
    file = PUBLISHED / f"{name}.json"
    if not file.is_file():
        known = ", ".join(published_names())
        raise ConfigError("unknown published size", expected=f"one of {known}", got=name)
    return json.loads(file.read_text(encoding="utf-8"))


def published_name(checkpoint: str) -> str | None:
    """Published size that a checkpoint's name or path names: ``Qwen2.5-VL-7B-Instruct`` is ``qwen2_5_vl_7b``.

    What the reference's guides call their conversions (``Qwen2.5VL-7B-Instruct-to-mcore``) is read as well.
    """
    name = re.sub(r"-(to-mcore|mcore|dcp)$", "", Path(checkpoint).name.lower())
    name = re.sub(r"-(instruct|thinking)$", "", name)
    name = re.sub(r"[-.]", "_", re.sub(r"^(qwen[\d.]+)vl", r"\1-vl", name))
    return name if (PUBLISHED / f"{name}.json").is_file() else None


def published_architecture(name: str) -> Architecture:
    """Sizes of a published model, such as ``qwen2_5_vl_7b``."""
    return architecture_from_hf(published_config(name))


def architecture_from_hf(hf_config: dict[str, Any], *, where: str = "config.json") -> Architecture:
    """Sizes that a HF config describes."""
    return family_part(detect_family(hf_config, where=where), "config").ModelConfig.from_hf(hf_config)


def load_architecture(folder: Path) -> Architecture:
    """Sizes of the checkpoint in `folder`, from its ``config.json``."""
    return architecture_from_hf(read_hf_config(folder), where=str(folder / "config.json"))
