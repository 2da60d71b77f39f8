# SPDX-License-Identifier: Apache-2.0
"""How far rounding alone drives two runs of one recipe apart, beside how far two engines come apart.

    python -m benchmarks.rounding suites/cross_engine/tiny_qwen2_5_vl.toml [--nudges 2] [--work runs/rounding]

Trains the recipe, the same recipe on the FSDP2 engine, and the recipe from weights of which every element was moved to
the next float up or down, a coin decides: the same model to the last digit but one. Each is judged against the first.
Where the nudged runs end as far apart as the engines do, the distance is the recipe's chaos and says nothing about the
engines. On a CPU; runs that are there already are read, not trained again.
"""

import argparse
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from harness.assets import ensure_inputs
from harness.cases import cases_of_recipe
from harness.grading import compare
from harness.launch import child_environment, launch, train_command
from harness.policy import load_policy
from harness.records import load_record
from models.contract.compat_train import recipe_toml
from models.contract.recipe import Recipe, parse_recipe
from models.contract.record import RUN_FILE, read_run_info
from models.contract.site import Site, load_site

GATES = ("C2", "C3", "C4", "C6")


def main() -> int:
    """Train what is missing, judge, print one line a run."""
    parser = argparse.ArgumentParser(prog="benchmarks.rounding", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--nudges", type=int, default=2, help="runs from nudged weights")
    parser.add_argument("--work", type=Path, default=Path("runs/rounding"))
    parser.add_argument("--site", type=Path, default=None)
    arguments = parser.parse_args()
    site = load_site(arguments.site)
    case = cases_of_recipe(arguments.recipe.absolute())[0]
    ensure_inputs(case, site)
    recipes = {"megatron": changed(case.recipe), "fsdp2": changed(case.recipe, engine="fsdp2")}
    for seed in range(1, arguments.nudges + 1):
        folder = arguments.work / f"{case.recipe.model.checkpoint}-nudged-{seed}"
        nudged_copy(site.checkpoint(case.recipe.model.checkpoint), folder, seed)
        recipes[f"nudged-{seed}"] = changed(case.recipe, checkpoint=str(folder.absolute()))
    folders = {
        name: trained(recipe, arguments.work / case.name / name, site, arguments.site)
        for name, recipe in recipes.items()
    }
    reference, policy = load_record(folders["megatron"]), load_policy()
    for name, folder in folders.items():
        if name != "megatron":
            verdict = compare(load_record(folder), reference, policy)
            print(f"{case.name}: {name} against megatron: {verdict.name}")
            for gate in verdict.gates:
                if gate.gate.startswith("C") or gate.gate == "held_out":
                    print(f"  {gate.gate:<4} {gate.status:<12} {gate.summary}")
    return 0


def changed(recipe: Recipe, *, engine: str = "megatron", checkpoint: str | None = None) -> Recipe:
    """The recipe on another engine, or from other weights; nothing is kept of it."""
    data = recipe.model_dump(mode="json")
    data["train"]["engine"] = engine
    data["model"]["checkpoint"] = checkpoint or recipe.model.checkpoint
    data["checkpoint"] |= {"save_interval": None, "save_final": False}
    return parse_recipe(data, where=recipe.name)


def nudged_copy(source: Path, target: Path, seed: int) -> None:
    """Copy a checkpoint folder with every weight moved to a neighbouring float."""
    if target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    for file in partial.glob("*.safetensors"):
        tensors = {name: nudge(name, tensor, seed) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    partial.rename(target)


def nudge(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Every element of a floating tensor one float up or down; any other tensor as it is."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    is_up = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.bool)
    limits = torch.where(is_up, torch.inf, -torch.inf).to(tensor.dtype)
    return torch.nextafter(tensor, limits)


def trained(recipe: Recipe, folder: Path, site: Site, site_file: Path | None) -> Path:
    """Train into `folder`, unless it holds the whole run already."""
    folder = folder.absolute()
    if (folder / RUN_FILE).is_file() and read_run_info(folder).outcome.status == "completed":
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".toml")
    file.write_text(recipe_toml(recipe), encoding="utf-8")
    command = train_command(file, folder, recipe.num_processes, site_file)
    launch(command, folder, environment=child_environment("cpu", 1))
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
