# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks by lmms-eval or VLMEvalKit, where one of them is installed: its command for a checkpoint."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from models.contract.architecture import Family
from models.contract.errors import ConfigError

Toolkit = Literal["lmms-eval", "vlmevalkit"]
MODULES: dict[Toolkit, str] = {"lmms-eval": "lmms_eval", "vlmevalkit": "vlmeval"}
SOURCES: dict[Toolkit, str] = {
    "lmms-eval": "pip install lmms-eval",
    "vlmevalkit": "git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit",
}
LMMS_EVAL_MODELS: dict[Family, str] = {
    "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_omni": "qwen3_omni"
}  # fmt: skip
CONFIG_FILE = "vlmevalkit.json"
VLMEVALKIT_CLASSES: dict[Family, str] = {"qwen2_5_vl": "Qwen2VLChat", "qwen3_vl": "Qwen3VLChat"}


def toolkit_command(
    toolkit: Toolkit,
    family: Family,
    weights: Path,
    *,
    name: str,
    tasks: Sequence[str],
    out: Path,
    batch_size: int = 1,
) -> tuple[list[str], str]:
    """The command that asks the questions of public benchmarks, and the text of :data:`CONFIG_FILE` in `out` for it.

    Args:
        toolkit: Which one.
        family: Decides the toolkit's adapter.
        weights: HF folder.
        name: What the toolkit calls the model in its results.
        tasks: lmms-eval: task names; VLMEvalKit: NAME=CLASS, its dataset and the class that reads it.
        out: Folder of the results.
        batch_size: lmms-eval only.

    Returns: The command, and what the config file holds; empty where the toolkit takes none.

    Raises:
        ConfigError: the toolkit is not installed, lacks the family, or a task has another form.
    """
    weights, out = weights.absolute(), out.absolute()
    spec = find_spec(MODULES[toolkit])
    if spec is None:
        raise ConfigError(
            f"{toolkit} is not installed", where=sys.executable, expected=f"a package {MODULES[toolkit]}",
            fix=f"{SOURCES[toolkit]}, in this environment; or use `generate evaluate`, which needs neither",
        )  # fmt: skip
    if toolkit == "lmms-eval":
        return [
            sys.executable, "-m", "lmms_eval", "--model", LMMS_EVAL_MODELS[family],
            "--model_args", f"pretrained={weights}",
            "--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(out), "--log_samples",
        ], ""  # fmt: skip
    if family not in VLMEVALKIT_CLASSES:
        raise ConfigError(
            f"VLMEvalKit has no adapter for {family}",
            expected=", ".join(VLMEVALKIT_CLASSES),
            fix="use lmms-eval",
        )
    script = Path(next(iter(spec.submodule_search_locations or [""]))).parent / "run.py"
    if not script.is_file():
        raise ConfigError(
            "VLMEvalKit's run.py is not beside its package", where=str(script), fix=SOURCES["vlmevalkit"]
        )
    data = {dataset: {"class": reader, "dataset": dataset} for dataset, reader in map(_dataset, tasks)}
    model = {"class": VLMEVALKIT_CLASSES[family], "model_path": str(weights)}
    config = json.dumps({"model": {name: model}, "data": data}, indent=1) + "\n"
    return [
        sys.executable,
        str(script),
        "--config",
        str(out / CONFIG_FILE),
        "--work-dir",
        str(out),
    ], config


def _dataset(task: str) -> tuple[str, str]:
    dataset, sign, reader = task.partition("=")
    if not (dataset and sign and reader):
        raise ConfigError(
            "not a VLMEvalKit dataset", where="--task", got=task,
            expected="NAME=CLASS, for example MMBench_DEV_EN=ImageMCQDataset",
        )  # fmt: skip
    return dataset, reader
