# SPDX-License-Identifier: Apache-2.0
"""The runs that detection needs: tiny checkpoints that know their task, healthy launches, launches with a fault."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.hardware import REPOSITORY
from models.contract.errors import RunError
from suites.detection.checkpoint_faults import write_faulty_checkpoint
from suites.detection.faults import FAULTS, Fault

HERE = Path(__file__).parent
SETUPS = {
    "qwen3_vl": ("qwen3_vl", "tiny-qwen3_vl", ()),
    "qwen2_5_vl": ("qwen2_5_vl", "tiny-qwen2_5_vl", ()),
    "qwen3_vl_moe": ("qwen3_vl", "tiny-qwen3_vl_moe", ("--moe",)),
}
"""By setup: family, name of the untrained tiny checkpoint, options that make it."""
BASELINE_THREADS = (1, 2, 1)
"""One launch each: other thread counts are another rounding, so the A/A pairs are not bit-equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run. `fault` is None in a healthy one and where the fault is in the checkpoint."""

    name: str
    recipe: Path
    run_dir: Path
    site: Path
    num_threads: int = 1
    fault: str | None = None
    num_processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Folders of one session."""

    folder: Path

    @property
    def site(self) -> Path:
        """The site file."""
        return self.folder / "site.toml"

    def checkpoint(self, name: str) -> Path:
        """A checkpoint of the site."""
        return self.folder / "checkpoints" / name

    def run_dir(self, name: str) -> Path:
        """A run directory."""
        return self.folder / "runs" / name


def prepare(folder: Path, setups: list[str]) -> Workshop:
    """Make the site, the scenes and a trained tiny checkpoint of every setup; what is there is kept."""
    shop = Workshop(folder=folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    _write_site(shop.site, shop.folder / "checkpoints", shop.folder / "datasets")
    scenes = shop.folder / "datasets" / "scenes"
    if not scenes.exists():
        _run(["models.entry.prepare", "synth", "--preset", "scenes", "--output", str(scenes)])
    for setup in setups:
        _prepare_checkpoint(shop, setup)
    return shop


def _prepare_checkpoint(shop: Workshop, setup: str) -> None:
    family, tiny, options = SETUPS[setup]
    tuned, untrained = shop.checkpoint(f"tuned-{setup}"), shop.checkpoint(tiny)
    if tuned.exists():
        return
    if not untrained.exists():
        _run(["models.entry.convert", "tiny", str(untrained), "--family", family, *options])
    job = Job(
        name=f"pretrain-{setup}",
        recipe=write_recipe(shop, f"pretrain-{setup}", "_pretrain.toml", family=family, checkpoint=tiny),
        run_dir=shop.run_dir(f"pretrain-{setup}"),
        site=shop.site,
    )
    if not job.run_dir.exists():
        train([job], shop)
    _run(["models.entry.convert", "megatron-to-hf", str(job.run_dir), str(tuned), "--hf", str(untrained)])


def write_recipe(
    shop: Workshop,
    name: str,
    template: str,
    *,
    family: str,
    checkpoint: str,
    changes: dict[str, str] | None = None,
) -> Path:
    """Fill a template in; `changes` replaces whole lines by the start of each."""
    text = (HERE / template).read_text(encoding="utf-8")
    text = text.replace("{family}", family).replace("{checkpoint}", checkpoint)
    for start, line in (changes or {}).items():
        text = "\n".join(line if row.startswith(start) else row for row in text.splitlines()) + "\n"
    path = shop.folder / "recipes" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def baseline_jobs(shop: Workshop, setup: str) -> list[Job]:
    """Healthy launches of a setup's recipe."""
    recipe = fine_tune_recipe(shop, setup)
    return [
        Job(
            name=f"{setup}-healthy-{number}",
            recipe=recipe,
            run_dir=shop.run_dir(f"{setup}-healthy-{number}"),
            site=shop.site,
            num_threads=threads,
        )
        for number, threads in enumerate(BASELINE_THREADS, start=1)
    ]


def fine_tune_recipe(shop: Workshop, setup: str) -> Path:
    """The recipe that faults of a setup are planted in."""
    family = SETUPS[setup][0]
    return write_recipe(shop, setup, "_fine_tune.toml", family=family, checkpoint=f"tuned-{setup}")


def fault_jobs(shop: Workshop, setup: str) -> list[Job]:
    """A launch for every fault of a setup that shows in training."""
    faults = [fault for fault in FAULTS if fault.setup == setup]
    return [
        _fault_job(shop, fault)
        for fault in faults
        if fault.area in {"model", "conversion", "data", "training"}
    ]


def _fault_job(shop: Workshop, fault: Fault) -> Job:
    site = shop.site
    if fault.area == "conversion":
        folder = shop.folder / "faulty" / fault.name
        if not folder.exists():
            name = f"tuned-{fault.setup}"
            write_faulty_checkpoint(shop.checkpoint(name), folder / name, fault.name)
            _write_site(folder / "site.toml", folder, shop.folder / "datasets")
        site = folder / "site.toml"
    return Job(
        name=fault.name,
        recipe=fine_tune_recipe(shop, fault.setup),
        run_dir=shop.run_dir(f"fault-{fault.name}"),
        site=site,
        fault=None if fault.area == "conversion" else fault.name,
    )


def healthy_jobs(shop: Workshop, *, num_seeds: int, num_tensor_parallel: int) -> dict[int, list[Job]]:
    """Healthy launches by seed: thread counts, micro-batch sizes, and two tensor-parallel ranks for the first seeds."""
    jobs: dict[int, list[Job]] = {}
    for seed in range(1, num_seeds + 1):
        variants: list[tuple[str, dict[str, str], int, int]] = [
            ("threads-1", {}, 1, 1),
            ("threads-2", {}, 2, 1),
            ("micro-2", {"micro_batch_size": "micro_batch_size = 2"}, 1, 1),
            ("micro-8", {"micro_batch_size": "micro_batch_size = 8"}, 1, 1),
        ]
        if seed <= num_tensor_parallel:
            split = {
                "hardware": 'hardware = ["cpu"]\nnum_processes = 2',
                "[checkpoint]": "[parallel]\ntensor_model_parallel_size = 2\n[checkpoint]",
            }
            variants.append(("tp-2", split, 1, 2))
        jobs[seed] = []
        for name, changes, threads, processes in variants:
            full = f"seed-{seed}-{name}"
            changes = {**changes, "global_batch_size": f"global_batch_size = 8\nseed = {1000 + seed}"}
            recipe = write_recipe(
                shop, full, "_fine_tune.toml", family="qwen3_vl", checkpoint="tuned-qwen3_vl", changes=changes
            )
            jobs[seed].append(
                Job(
                    name=full,
                    recipe=recipe,
                    run_dir=shop.run_dir(full),
                    site=shop.site,
                    num_threads=threads,
                    num_processes=processes,
                )
            )
    return jobs


def train(jobs: list[Job], shop: Workshop) -> None:
    """Run what has not run yet. A run that fails says so in its run directory."""
    waiting = [job for job in jobs if not job.run_dir.exists()]
    single = [job for job in waiting if job.num_processes == 1]
    if single:
        listed = [
            {
                "fault": job.fault,
                "recipe": str(job.recipe),
                "run_dir": str(job.run_dir),
                "site": str(job.site),
                "num_threads": job.num_threads,
            }
            for job in single
        ]
        plan = shop.folder / "jobs.json"
        plan.write_text(json.dumps(listed, indent=1), encoding="utf-8")
        _run(["suites.detection.train_with_fault", str(plan)])
    for job in waiting:
        if job.num_processes > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(job.num_processes)]
            files = ["--recipe", str(job.recipe), "--run-dir", str(job.run_dir), "--site", str(job.site)]
            _run([*launcher, "-m", "models.entry.train", *files])


def _write_site(path: Path, checkpoints: Path, datasets: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'checkpoints = "{checkpoints}"\ndatasets = "{datasets}"\nscratch = "{path.parent}"\n',
        encoding="utf-8",
    )


def _run(module: list[str]) -> None:
    """Run a program of this repository. Raises RunError with its last lines when it fails."""
    # The children of train_with_fault set their own number of threads; a pool in the parent would not survive a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{module[0]} failed", where=" ".join(module), got=done.stderr[-2000:])
