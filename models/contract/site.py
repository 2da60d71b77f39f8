# SPDX-License-Identifier: Apache-2.0
"""Where a site keeps its checkpoints, datasets and scratch space: said once, in ``site.toml``.

    checkpoints = "/data/checkpoints"
    datasets    = "/data/datasets"
    scratch     = "/scratch/qwen-harness"

Looked for as ``$QWEN_HARNESS_SITE``, then ``site.toml`` in the repository root. Without one, everything lives under
``work/`` in the repository.
"""

import json
import os
import tomllib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from models.contract.errors import ConfigError
from models.contract.recipe import STRICT

REPOSITORY = Path(__file__).resolve().parents[2]


class Site(BaseModel):
    """Folders of one site."""

    model_config = STRICT
    checkpoints: str = str(REPOSITORY / "work" / "checkpoints")
    datasets: str = str(REPOSITORY / "work" / "datasets")
    scratch: str = str(REPOSITORY / "work" / "scratch")

    def checkpoint(self, name: str) -> Path:
        """Path of a named checkpoint; a name that is a path stays one."""
        return _find(name, self.checkpoints)

    def dataset(self, name: str) -> Path:
        """Path of a named dataset; a name that is a path stays one."""
        return _find(name, self.datasets)


def load_site(path: Path | None = None) -> Site:
    """Read the site file. Raises ConfigError if it is named and missing, or malformed."""
    named = path or (Path(os.environ["QWEN_HARNESS_SITE"]) if "QWEN_HARNESS_SITE" in os.environ else None)
    file = named or REPOSITORY / "site.toml"
    if not file.exists():
        if named:
            raise ConfigError(
                "site file not found", where=str(file), fix="create it or unset QWEN_HARNESS_SITE"
            )
        return Site()
    try:
        return Site.model_validate_json(json.dumps(tomllib.loads(file.read_text(encoding="utf-8"))))
    except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "site file is malformed",
            where=str(file),
            expected="checkpoints, datasets, scratch: folders",
            got=str(error),
        ) from None


def _find(name: str, folder: str) -> Path:
    as_path = Path(name).expanduser()
    return as_path if as_path.is_absolute() or as_path.exists() else Path(folder).expanduser() / name
