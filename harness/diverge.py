# SPDX-License-Identifier: Apache-2.0
"""Where two runs part: the first step by their metrics, then the first tensor of that step, forward and backward.

What is compared may be a run directory, which is read, or a recipe, which is trained for a few steps. The step at which
two runs part is then trained once more on both sides, with its tensors recorded.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from harness.cases import cases_of_recipe
from harness.hardware import Probe, probe_host
from harness.launch import child_environment, launch, train_command
from models.contract.compat_train import recipe_toml
from models.contract.divergence import (
    PointDistance,
    StepDifference,
    distances,
    first_step,
    first_tensor,
    read_trace,
    trace_file,
)
from models.contract.errors import ConfigError, RunError
from models.contract.recipe import Recipe, differences, parse_recipe
from models.contract.record import RUN_FILE, load_run_info

logger = logging.getLogger(__name__)

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative distance up to which two computations of one thing may differ, by the coarser number format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two runs."""

    name: str
    recipe: Recipe
    run: Path | None
    """A run directory that is there; None: it has to be trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """What was found."""

    tolerance: float
    step: StepDifference | None
    """First step whose metrics differ; None: none did."""
    recorded: int | None
    """Iteration whose tensors were compared; None where data or schedule differ, which tensors do not explain."""
    points: tuple[PointDistance, ...] = ()
    recipes: tuple[str, ...] = ()
    """Keys of the recipes that change numbers and differ."""

    @property
    def parts(self) -> bool:
        """Whether the runs part."""
        return self.step is not None or self.forward is not None or self.backward is not None

    @property
    def forward(self) -> PointDistance | None:
        """First tensor that differs on the way forward."""
        return first_tensor(list(self.points), "forward", tolerance=self.tolerance)

    @property
    def backward(self) -> PointDistance | None:
        """First gradient that differs on the way back."""
        return first_tensor(list(self.points), "backward", tolerance=self.tolerance)

    def lines(self) -> list[str]:
        """For people."""
        rows = [f"recipes: {'; '.join(self.recipes) or 'equal'}", _step_line(self.step, self.tolerance)]
        if self.recorded is None:
            return rows
        rows.append(f"tensors of iteration {self.recorded}, {len(self.points)} points on both sides:")
        for phase, found in (("forward", self.forward), ("backward", self.backward)):
            worst = max(
                (point for point in self.points if point.phase == phase), key=lambda point: point.relative
            )
            if found is None:
                rows.append(f"  {phase + ':':<10}equal; largest distance {_apart(worst)} at {worst.point}")
            else:
                rows.append(
                    f"  {phase + ':':<10}first at {found.point}: {_apart(found)} apart (sample {found.sample}); "
                    f"largest {_apart(worst)} at {worst.point}"
                )
        return rows


def open_side(path: Path) -> Side:
    """A run directory or a recipe file.

    Raises:
        ConfigError: it is neither, or the recipe is malformed.
        RunError: the run directory cannot be read.
    """
    if path.suffix == ".toml" and path.is_file():
        recipe = cases_of_recipe(path.absolute())[0].recipe
        return Side(name=recipe.name, recipe=recipe, run=None)
    if (path / RUN_FILE).is_file():
        info = load_run_info(path)
        return Side(name=path.name, recipe=parse_recipe(info.recipe, where=str(path / RUN_FILE)), run=path)
    raise ConfigError(
        "neither a run directory nor a recipe",
        where=str(path),
        expected=f"a folder with {RUN_FILE}, or a .toml file",
        got="something else" if path.exists() else "nothing there",
        fix="check the path",
    )


def diverge(
    first: Path,
    second: Path,
    work: Path,
    *,
    steps: int,
    tolerance: float | None = None,
    site_file: Path | None = None,
) -> Divergence:
    """Find where two runs part.

    Args:
        first: Run directory or recipe.
        second: The same.
        work: New folder for what is trained.
        steps: Iterations that a recipe is trained for.
        tolerance: Relative distance that counts as equal; None goes by the number format.
        site_file: Where checkpoints and datasets are.

    Raises:
        ConfigError: an argument is neither run nor recipe, the models are of two families, or the folder is taken.
        RunError: training failed, or the runs share nothing.
    """
    sides = (open_side(first), open_side(second))
    families = [side.recipe.model.family for side in sides]
    if families[0] != families[1]:
        raise ConfigError(
            "the runs are of two model families", where=f"{first} and {second}",
            expected="one model, in two engines, layouts or commits", got=" and ".join(families),
            fix="compare runs of one family",
        )  # fmt: skip
    if work.exists() and any(work.iterdir()):
        raise ConfigError("the work folder is not empty", where=str(work), fix="choose another --work")
    if tolerance is None:
        tolerance = max(TOLERANCE[side.recipe.precision.dtype] for side in sides)
    runs = [
        side.run or _train(side, work / label, steps, site_file, trace=None)
        for label, side in zip(("a", "b"), sides, strict=True)
    ]
    recipe_a, recipe_b = (side.recipe.what_changes_numbers() for side in sides)
    recipes = tuple(differences(recipe_a, recipe_b, "in A", "in B"))
    step = first_step(*runs, tolerance=tolerance)
    if step is not None and step.relative is None:
        return Divergence(tolerance=tolerance, step=step, recorded=None, recipes=recipes)
    iteration = step.iteration if step is not None else _last_shared(sides, steps)
    traces = [
        read_trace(_recorded(side, run, work / f"{label}-traced", iteration, site_file), iteration)
        for label, side, run in zip(("a", "b"), sides, runs, strict=True)
    ]
    points = tuple(distances(traces[0], traces[1]))
    return Divergence(tolerance=tolerance, step=step, recorded=iteration, points=points, recipes=recipes)


def _last_shared(sides: tuple[Side, Side], steps: int) -> int:
    """The step to look at when no metric differs: the first of a long run, the last of a short one."""
    return 1 if all(side.run for side in sides) else min(steps, *(s.recipe.train.train_iters for s in sides))


def _recorded(side: Side, run: Path, folder: Path, iteration: int, site_file: Path | None) -> Path:
    """A run directory with the tensors of one iteration: the run itself if it recorded it, else a new one."""
    if trace_file(run, iteration, 0).is_file():
        return run
    return _train(side, folder, iteration, site_file, trace=iteration)


def _train(side: Side, run: Path, steps: int, site_file: Path | None, *, trace: int | None) -> Path:
    """Train the first steps of a side's recipe."""
    run.parent.mkdir(parents=True, exist_ok=True)
    data = side.recipe.model_dump(mode="json")
    data["checkpoint"] |= {"save_interval": None, "save_final": False}
    recipe = run.with_name(run.name + ".toml")
    recipe.write_text(recipe_toml(parse_recipe(data, where=side.name)), encoding="utf-8")
    command = train_command(recipe.absolute(), run.absolute(), side.recipe.num_processes, site_file)
    command += ["--stop-after", str(steps), *(["--trace", str(trace)] if trace else [])]
    logger.info("training %d iteration(s) of %s in %s", steps, side.name, run)
    result = launch(command, run.absolute(), environment=child_environment(_hardware(probe_host()), 1))
    if not result.completed:
        raise RunError(
            f"{side.name} did not train", where=str(run / "launch.log"), got=result.last.reason,
            fix="read the log; a run of another commit must have been trained with --trace there",
        )  # fmt: skip
    return run


def _hardware(probe: Probe) -> str:
    return probe.hardware or probe.kind


def _apart(point: PointDistance) -> str:
    return "shapes" if math.isinf(point.relative) else f"{point.relative:.1e}"


def _step_line(step: StepDifference | None, tolerance: float) -> str:
    if step is None:
        return f"metrics: equal up to {tolerance:.0e} in every step that both have"
    if step.relative is None:
        return (
            f"metrics: the runs did different things from iteration {step.iteration} on: {step.field} is "
            f"{step.first!r} and {step.second!r}"
        )
    return (
        f"metrics: first at iteration {step.iteration}: {step.field} is {step.first!r} and {step.second!r}, "
        f"{step.relative:.1e} apart"
    )
