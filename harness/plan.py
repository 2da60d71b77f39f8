# SPDX-License-Identifier: Apache-2.0
"""What a selection of cases would do: commands, device-hours, memory, disk, missing inputs. Starts nothing."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.assets import CONFIGS, maker
from harness.baselines.schema import BaselineKey
from harness.baselines.store import baseline_path, load_baseline
from harness.cases import Case, missing_inputs
from harness.devices import HARDWARE
from harness.hardware import Probe, probe_host
from harness.launch import train_command
from harness.session import BASELINES, RUNS
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.families import (
    architecture_from_hf,
    load_architecture,
    published_architecture,
    published_name,
)
from models.contract.layout import check_layout
from models.contract.plan import SHARE_OF_PEAK, TrainingPlan, checkpoint_bytes, plan_training
from models.contract.run_rules import check_run
from models.contract.site import Site

METRICS_BYTES_PER_ITERATION = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCase:
    """One case as it would run."""

    case: Case
    command: list[str]
    device_hours: float | None
    device_hours_from: str
    """`baseline`, `estimate`, or why there is none."""
    disk_gib: float | None
    free_gib: float
    """Free where runs are written."""
    training: TrainingPlan | None
    """Memory and work; None where nothing says how large the model is, or the class has no device memory."""
    sizes_from: str
    """Where the model's sizes were read."""
    missing: tuple[str, ...]
    refused: tuple[str, ...]
    """What cannot run: rules that the layout breaks for this model, device memory, disk."""
    runs_here: bool


def plan_case(
    case: Case, site: Site, *, baselines: Path = BASELINES, probe: Probe | None = None
) -> PlannedCase:
    """Work out what one case would take."""
    probe = probe or probe_host()
    missing = missing_inputs(case, site)
    architecture, sizes_from = _architecture(case, site)
    training = _training(case, architecture)
    step_ms, source = _step_time(case, baselines, training)
    iterations, devices = case.recipe.train.train_iters, case.recipe.num_processes
    folder = f"runs/TIME/{case.suite}/{case.name}@{case.hardware}"
    disk, free = _disk_gib(case, architecture), _free_gib(RUNS)
    return PlannedCase(
        case=case,
        command=["python", *train_command(case.recipe_file, Path(folder), devices, None)[1:]],
        device_hours=None if step_ms is None else iterations * step_ms / 3.6e6 * devices,
        device_hours_from=source,
        disk_gib=disk,
        free_gib=free,
        training=training,
        sizes_from=sizes_from,
        missing=tuple(
            dict.fromkeys(  # a dataset may be named twice, for training and for evaluation
                f"{item.kind} '{item.name}' at {item.path}: "
                + ("made on the spot" if maker(item) else item.fix)
                for item in missing
            )
        ),
        refused=_refused(case, architecture, training, disk, free if probe.has(case.hardware) else None),
        runs_here=probe.has(case.hardware),
    )


def plan_text(planned: list[PlannedCase]) -> str:
    """The plan for people."""
    lines = [f"{len(planned)} case(s); this host: {probe_host().describe()}", ""]
    for row in planned:
        hours = "unknown" if row.device_hours is None else f"{row.device_hours:.2f}"
        disk = "unknown" if row.disk_gib is None else f"{row.disk_gib:.2f} GiB"
        lines += [
            f"{row.case.id}",
            f"  runs here:    {'yes' if row.runs_here else f'no, needs {HARDWARE[row.case.hardware].title}'}",
            f"  devices:      {row.case.recipe.num_processes}, {_layout(row.case)}",
            f"  device-hours: {hours} ({row.device_hours_from})",
            f"  disk:         {disk}; {row.free_gib:.0f} GiB free here",
            f"  command:      {shlex.join(row.command)}",
        ]
        if row.training is not None:
            lines += [f"  {text}" for text in row.training.lines()]
        lines += [f"  sizes:        {row.sizes_from}"]
        lines += [f"  missing:      {text}" for text in row.missing]
        lines += [f"  refused:      {text}" for text in row.refused]
    known = [row.device_hours for row in planned if row.device_hours is not None]
    lines += ["", f"total: {sum(known):.2f} device-hours over {len(known)} of {len(planned)} cases"]
    return "\n".join(lines)


def require_possible(planned: list[PlannedCase]) -> None:
    """Refuse a selection that holds what cannot run.

    Raises:
        ConfigError: it names every such case; what is wrong with it, and the smallest change, is in its plan.
    """
    refused = [row for row in planned if row.refused]
    if refused:
        raise ConfigError(
            f"{len(refused)} case(s) cannot run as they are",
            where=", ".join(row.case.id for row in refused),
            got="; ".join(text for row in refused for text in row.refused)[:2000],
            fix="change the keys named above, or choose another class",
        )


def _layout(case: Case) -> str:
    """The layout in one phrase."""
    parallel = case.recipe.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size, "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size, "ep": parallel.expert_model_parallel_size,
        "dp": case.recipe.data_parallel_size,
    }  # fmt: skip
    text = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "dp")
    return f"{text}, {case.recipe.num_microbatches} micro-batch(es) of {case.recipe.train.micro_batch_size}"


def _architecture(case: Case, site: Site) -> tuple[Architecture | None, str]:
    """Sizes of the case's model, and where they come from: its checkpoint, what is made here, a published size."""
    name = case.recipe.model.checkpoint
    folder = site.checkpoint(name)
    if (folder / "config.json").is_file():
        return load_architecture(folder), str(folder / "config.json")
    if name in CONFIGS:
        return architecture_from_hf(CONFIGS[name]()), "the checkpoint that will be made on the spot"
    published = published_name(name)
    if published is None:
        return None, "unknown: the checkpoint is not here, and its name is no published size"
    return published_architecture(published), f"published {published}: the checkpoint is not here"


def _training(case: Case, architecture: Architecture | None) -> TrainingPlan | None:
    row = HARDWARE[case.hardware]
    if architecture is None or row.memory_gib is None:
        return None
    return plan_training(case.recipe, architecture, memory_gib=row.memory_gib, bf16_tflops=row.bf16_tflops)


def _refused(
    case: Case,
    architecture: Architecture | None,
    training: TrainingPlan | None,
    disk_gib: float | None,
    free_gib: float | None,
) -> tuple[str, ...]:
    problems = (
        check_run(case.recipe, hardware=case.hardware)
        if architecture is None
        else check_layout(architecture, case.recipe, hardware=case.hardware)
    )
    refused = [str(problem) for problem in problems]
    if training is not None and not training.fits:
        refused.append(training.misfit())
    if disk_gib is not None and free_gib is not None and disk_gib > free_gib:
        refused.append(
            f"checkpoints need {disk_gib:.1f} GiB and {free_gib:.1f} GiB are free "
            "(free some, choose another --run-root, or lower checkpoint.keep_last)"
        )
    return tuple(refused)


def _step_time(case: Case, baselines: Path, training: TrainingPlan | None) -> tuple[float | None, str]:
    key = BaselineKey(suite=case.suite, case=case.name, recipe_sha="", hardware=case.hardware)
    path = baseline_path(baselines, key)
    if path.is_file():
        frames = load_baseline(path).frames()
        medians = [float(np.median(frame["step_time_ms"].to_numpy(dtype=float))) for frame in frames]
        return float(np.mean(medians)), "baseline"
    if training is None:
        return None, "no baseline, and no sizes or no device to estimate from"
    if training.expected_step_time_s is None:
        return None, "no baseline, and no peak to estimate from"
    return training.expected_step_time_s * 1e3, f"estimate at {SHARE_OF_PEAK:.0%} of peak"


def _disk_gib(case: Case, architecture: Architecture | None) -> float | None:
    """Checkpoints that lie on disk at once, one more than is kept while one is written, and the metrics."""
    kept, train_iters = case.recipe.checkpoint, case.recipe.train.train_iters
    metrics = train_iters * METRICS_BYTES_PER_ITERATION
    # the last iteration saves when save_final says so, whatever the interval
    num_saved = (train_iters - 1) // kept.save_interval if kept.save_interval else 0
    at_once = min(kept.keep_last + 1, num_saved + kept.save_final)
    if not at_once:
        return metrics / 2**30
    if architecture is None:
        return None
    return (at_once * checkpoint_bytes(case.recipe, architecture) + metrics) / 2**30


def _free_gib(folder: Path) -> float:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free / 2**30
