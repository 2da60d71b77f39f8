# SPDX-License-Identifier: Apache-2.0
"""Inputs that are made on the spot: tiny checkpoints, drawn scenes, the photographs of scikit-image.

A recipe names its checkpoint and dataset; most are a site's own, and a missing one is an error that says which path was
wanted and how to get it. The names in the tables below are made by a program of ``models.entry`` when they are missing.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness.cases import Case, MissingInput, missing_inputs
from harness.hardware import REPOSITORY
from harness.launch import child_environment
from models.contract.architecture import FAMILIES
from models.contract.errors import ConfigError, RunError
from models.contract.families import detect_family, published_config, published_names
from models.contract.site import Site
from models.contract.tiny_config import sized_config, tiny_config

logger = logging.getLogger(__name__)

Steps = Callable[[Path], list[list[str]]]
"""Programs that make an input, in order, given the path it should have."""


def tiny_checkpoint_name(family: str) -> str:
    """Name of a family's tiny checkpoint in recipes."""
    return f"tiny-{family}"


def config_name(published: str) -> str:
    """Name in recipes of a published size's folder without weights, for `model.init = "random"`."""
    return f"config-{published}"


def _config_only(published: str) -> Steps:
    flags = ("--size", published, "--dtype", "bf16", "--no-weights")

    def steps(path: Path) -> list[list[str]]:
        return _tiny(detect_family(published_config(published)), *flags)(path)

    return steps


def _tiny(family: str, *flags: str) -> Steps:
    return lambda path: [["models.entry.convert", "tiny", str(path), "--family", family, *flags]]


def _drawn(preset: str, *, num_train: int = 5000, workers: int = 2) -> Steps:
    # so many that 500 steps meet no scene twice: what is learnt is looking, not the list
    size = ["--train", str(num_train), "--workers", str(workers)]
    return lambda path: [["models.entry.prepare", "synth", "--preset", preset, *size, "--output", str(path)]]


def _photographs(path: Path) -> list[list[str]]:
    """Twelve real photographs in LLaVA's format, prepared like any LLaVA folder."""
    raw = path.with_name(path.name + ".raw")
    draw = [] if raw.is_dir() else [["models.entry.prepare", "photos", "--output", str(raw)]]
    prepare = [
        "models.entry.prepare",
        "llava-pretrain",
        str(raw),
        "--output",
        str(path),
        "--val-fraction",
        "0.1",
    ]
    return [*draw, prepare]


CHECKPOINTS: dict[str, Steps] = (
    {tiny_checkpoint_name(family): _tiny(family) for family in FAMILIES}
    | {config_name(published): _config_only(published) for published in published_names()}
    | {
        "tiny-qwen3_vl_moe": _tiny("qwen3_vl", "--moe"),
        "sized-qwen3_vl_2b": _tiny("qwen3_vl", "--size", "qwen3_vl_2b", "--dtype", "bf16"),
    }
)
CONFIGS: Mapping[str, Callable[[], dict[str, Any]]] = (
    {tiny_checkpoint_name(family): partial(tiny_config, family) for family in FAMILIES}
    | {config_name(published): partial(sized_config, published) for published in published_names()}
    | {
        "tiny-qwen3_vl_moe": partial(tiny_config, "qwen3_vl", moe=True),
        "sized-qwen3_vl_2b": partial(sized_config, "qwen3_vl_2b"),
    }
)
"""What ``config.json`` of each of those checkpoints will say, so that planning knows its sizes before it is made."""
DATASETS: dict[str, Steps] = {
    "scenes": _drawn("scenes"),
    "scenes-audio": _drawn("scenes-audio"),
    "colours": _drawn("colours", num_train=3000),
    "colours-audio": _drawn("colours-audio", num_train=4500),
    "colours-40k": _drawn("colours", num_train=40_000, workers=8),
    "colours-64k": _drawn("colours", num_train=64_000, workers=8),
    "photos": _photographs,
}


def ensure_inputs(case: Case, site: Site) -> None:
    """Make what can be made of the case's missing inputs.

    Raises:
        ConfigError: an input is missing that only a person can provide.
        RunError: a program that makes one failed; its last lines are in the message.
    """
    ensure([case], site)


def ensure(cases: list[Case], site: Site) -> None:
    """Make the inputs that any of the cases misses, each once. Raises as :func:`ensure_inputs`."""
    wanted = {item.path: (item, case) for case in cases for item in missing_inputs(case, site)}
    foreign = [(item, case) for item, case in wanted.values() if maker(item) is None]
    if foreign:
        raise ConfigError(
            f"{len(foreign)} input(s) missing",
            where="; ".join(sorted({case.id for _, case in foreign})),
            expected="; ".join(f"{item.kind} '{item.name}' at {item.path}" for item, _ in foreign),
            fix="; ".join(item.fix for item, _ in foreign),
        )
    for item, _ in wanted.values():
        make(item)


def maker(item: MissingInput) -> Steps | None:
    """How the input is made; None when only a person can provide it."""
    return (CHECKPOINTS if item.kind == "checkpoint" else DATASETS).get(item.name)


def make(item: MissingInput) -> None:
    """Make one input, unless another process just did. Raises RunError when its program fails."""
    from filelock import FileLock

    steps = maker(item)
    if steps is None:
        raise ConfigError(
            f"{item.kind} '{item.name}' cannot be made here", where=str(item.path), fix=item.fix
        )
    item.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(item.path.with_name(item.path.name + ".lock")):
        if _is_there(item):
            return
        logger.info("making %s %s", item.kind, item.path)
        for arguments in steps(item.path):
            run_program(arguments)


def run_program(arguments: list[str]) -> str:
    """Run a program of ``models.entry`` on the CPU and return what it printed.

    Raises:
        RunError: it failed; what it printed last is in the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=child_environment("cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(
            f"{arguments[0]} failed with exit code {done.returncode}",
            where=" ".join(arguments),
            got="\n".join(done.stdout.strip().splitlines()[-15:]),
        )
    return done.stdout


def _is_there(item: MissingInput) -> bool:
    mark = "config.json" if item.kind == "checkpoint" else ".nv-meta"
    return (item.path / mark).exists()
