# SPDX-License-Identifier: Apache-2.0
"""What a selection of cases would do: commands, device-hours, disk, missing inputs. Starts nothing."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.assets import maker
from harness.baselines.schema import BaselineKey
from harness.baselines.store import baseline_path, load_baseline
from harness.cases import Case, missing_inputs
from harness.devices import HARDWARE
from harness.hardware import Probe, probe_host
from harness.launch import train_command
from harness.session import BASELINES
from models.contract.errors import HarnessError
from models.contract.families import load_architecture
from models.contract.flops import megatron_flops
from models.contract.layout import check_layout
from models.contract.site import Site

ASSUMED_SHARE_OF_PEAK = 0.4
"""Share of the dense peak that an estimate assumes where no baseline says how long a step takes."""
BYTES_PER_PARAMETER = 14
"""One checkpoint with optimizer: bf16 weights (2), fp32 master weights and two moments (12)."""
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
    missing: tuple[str, ...]
    refused: tuple[str, ...]
    """Rules that the layout breaks for this model; empty where the checkpoint is not here to ask."""
    runs_here: bool


def plan_case(
    case: Case, site: Site, *, baselines: Path = BASELINES, probe: Probe | None = None
) -> PlannedCase:
    """Work out what one case would take."""
    probe = probe or probe_host()
    missing = missing_inputs(case, site)
    step_ms, source = _step_time(case, site, baselines)
    iterations, devices = case.recipe.train.train_iters, case.recipe.num_processes
    folder = f"runs/TIME/{case.suite}/{case.name}@{case.hardware}"
    return PlannedCase(
        case=case,
        command=["python", *train_command(case.recipe_file, Path(folder), devices, None)[1:]],
        device_hours=None if step_ms is None else iterations * step_ms / 3.6e6 * devices,
        device_hours_from=source,
        disk_gib=_disk_gib(case, site),
        missing=tuple(
            f"{item.kind} '{item.name}' at {item.path}: " + ("made on the spot" if maker(item) else item.fix)
            for item in missing
        ),
        refused=_refused(case, site),
        runs_here=probe.has(case.hardware),
    )


def plan_text(cases: list[Case], site: Site, *, baselines: Path = BASELINES) -> str:
    """The plan for people."""
    planned = [plan_case(case, site, baselines=baselines) for case in cases]
    lines = [f"{len(planned)} case(s); this host: {probe_host().describe()}", ""]
    for row in planned:
        hours = "unknown" if row.device_hours is None else f"{row.device_hours:.2f}"
        disk = "unknown" if row.disk_gib is None else f"{row.disk_gib:.2f} GiB"
        lines += [
            f"{row.case.id}",
            f"  runs here:    {'yes' if row.runs_here else f'no, needs {HARDWARE[row.case.hardware].title}'}",
            f"  devices:      {row.case.recipe.num_processes}",
            f"  device-hours: {hours} ({row.device_hours_from})",
            f"  disk:         {disk}",
            f"  command:      {shlex.join(row.command)}",
        ]
        lines += [f"  missing:      {text}" for text in row.missing]
        lines += [f"  refused:      {text}" for text in row.refused]
    known = [row.device_hours for row in planned if row.device_hours is not None]
    lines += ["", f"total: {sum(known):.2f} device-hours over {len(known)} of {len(planned)} cases"]
    return "\n".join(lines)


def _refused(case: Case, site: Site) -> tuple[str, ...]:
    try:
        architecture = load_architecture(site.checkpoint(case.recipe.model.checkpoint))
    except HarnessError:
        return ()
    return tuple(str(problem) for problem in check_layout(architecture, case.recipe))


def _step_time(case: Case, site: Site, baselines: Path) -> tuple[float | None, str]:
    key = BaselineKey(suite=case.suite, case=case.name, recipe_sha="", hardware=case.hardware)
    path = baseline_path(baselines, key)
    if path.is_file():
        frames = load_baseline(path).frames()
        medians = [float(np.median(frame["step_time_ms"].to_numpy(dtype=float))) for frame in frames]
        return float(np.mean(medians)), "baseline"
    peak = HARDWARE[case.hardware].bf16_tflops
    if peak is None:
        return None, "no baseline, and no peak to estimate from"
    try:
        text = load_architecture(site.checkpoint(case.recipe.model.checkpoint)).text
    except HarnessError:
        return None, "no baseline, and the checkpoint is not here to estimate from"
    train = case.recipe.train
    flops = megatron_flops(
        text, num_sequences=train.global_batch_size, seq_length=case.recipe.data.seq_length
    )
    per_device = flops / case.recipe.num_processes
    return per_device / (
        ASSUMED_SHARE_OF_PEAK * peak * 1e12
    ) * 1e3, f"estimate at {ASSUMED_SHARE_OF_PEAK:.0%} of peak"


def _disk_gib(case: Case, site: Site) -> float | None:
    """Checkpoints the run keeps, with optimizer where the recipe saves it, and its metrics."""
    kept = case.recipe.checkpoint
    metrics = case.recipe.train.train_iters * METRICS_BYTES_PER_ITERATION
    if not (kept.save_final or kept.save_interval):
        return metrics / 2**30
    weights = sum(
        file.stat().st_size for file in site.checkpoint(case.recipe.model.checkpoint).glob("*.safetensors")
    )
    if not weights:
        return None
    one = weights / 2 * (BYTES_PER_PARAMETER if kept.save_optimizer else 2)
    return ((kept.keep_last if kept.save_interval else 1) * one + metrics) / 2**30
