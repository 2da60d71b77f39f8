# SPDX-License-Identifier: Apache-2.0
"""The case matrix: a case is one recipe on one hardware class.

A suite is a folder of recipes (``suites/<suite>/*.toml``). Its cases are every recipe times every class that the recipe
lists in `hardware`; ids, markers and baseline keys are computed from those, never typed a second time. A recipe whose
name starts with an underscore is a parent for others and makes no case.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.devices import hardware_class
from harness.hardware import REPOSITORY
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, load_recipe
from models.contract.site import Site

SUITES = REPOSITORY / "suites"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recipe on one hardware class."""

    suite: str
    hardware: str
    recipe: Recipe
    recipe_file: Path

    @property
    def name(self) -> str:
        """Name of the recipe: the `case` of a baseline's key."""
        return self.recipe.name

    @property
    def id(self) -> str:
        """`<suite>/<recipe>@<hardware>`."""
        return f"{self.suite}/{self.recipe.name}@{self.hardware}"

    @property
    def markers(self) -> tuple[str, ...]:
        """Markers for pytest: the hardware, the family, and `gpuN` for N devices."""
        devices = () if self.hardware == "cpu" else (f"gpu{self.recipe.num_processes}",)
        return (self.hardware, self.recipe.model.family, *devices)


def discover(root: Path = SUITES) -> list[Case]:
    """Cases of every suite under `root`, or of `root` itself when it holds recipes; sorted by id.

    Raises:
        ConfigError: a recipe is malformed, lists an unknown hardware class, or two recipes of one suite share a name.
    """
    folders = sorted({file.parent for file in root.rglob("*.toml")})
    return [case for folder in folders for case in cases_of_folder(folder)]


def cases_of_folder(folder: Path) -> list[Case]:
    """Cases of one suite: the recipes directly inside `folder`."""
    cases: list[Case] = []
    seen: dict[str, Path] = {}
    for file in sorted(folder.glob("*.toml")):
        if file.name.startswith("_"):
            continue
        recipe = load_recipe(file)
        if recipe.name in seen:
            raise ConfigError(
                f"two recipes are named '{recipe.name}'",
                where=f"{seen[recipe.name]} and {file}",
                expected="one name a recipe, a baseline is looked up by it",
                fix="rename one",
            )
        seen[recipe.name] = file
        cases += cases_of_recipe(file, recipe, suite=folder.name)
    return cases


def cases_of_recipe(file: Path, recipe: Recipe | None = None, *, suite: str | None = None) -> list[Case]:
    """Cases of one recipe file, one a hardware class."""
    recipe = recipe or load_recipe(file)
    for name in recipe.hardware:
        try:
            hardware_class(name)
        except ConfigError as error:
            raise error.with_note(f"while reading `hardware` of {file}") from None
    return [
        Case(suite=suite or file.parent.name, hardware=name, recipe=recipe, recipe_file=file)
        for name in recipe.hardware
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingInput:
    """A checkpoint or dataset that a case names and the site does not have."""

    kind: str
    name: str
    path: Path
    fix: str


def missing_inputs(case: Case, site: Site) -> list[MissingInput]:
    """Inputs of the case that are not there, each with the path that was looked for and how to get it."""
    model, data = case.recipe.model, case.recipe.data
    missing: list[MissingInput] = []
    checkpoint = site.checkpoint(model.checkpoint)
    if not (checkpoint / "config.json").is_file():
        missing.append(
            MissingInput(
                kind="checkpoint",
                name=model.checkpoint,
                path=checkpoint,
                fix=f"download the Hugging Face folder to {checkpoint}, or set `checkpoints` in site.toml",
            )
        )
    named = (data.dataset, data.eval_dataset) if data.fixed_shapes is None else ()
    for name in filter(None, named):
        folder = site.dataset(name)
        if not (folder / ".nv-meta").is_dir():
            missing.append(
                MissingInput(
                    kind="dataset",
                    name=name,
                    path=folder,
                    fix=f"prepare it with `qwen-harness data … --output {folder}`, or set `datasets` in site.toml",
                )
            )
    return missing
