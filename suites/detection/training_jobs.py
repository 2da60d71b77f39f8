# SPDX-License-Identifier: Apache-2.0
"""The runs that detection needs: tiny checkpoints that know their task, healthy launches, launches with a fault."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from harness.hardware import REPOSITORY
from models.contract.errors import RunError
from models.contract.record import RUN_FILE, read_run_info
from suites.detection.checkpoint_faults import write_faulty_checkpoint
from suites.detection.faults import Fault

HERE = Path(__file__).parent
ERROR_FILE = "error.txt"
"""In the run directory of a job that ended in an exception."""
TRAINED_AREAS = frozenset({"model", "conversion", "data", "training"})
"""Areas whose faults show in a training run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A tiny model and the fine-tune that faults are planted in."""

    family: str
    tiny: str
    """The untrained checkpoint."""
    tuned: str
    """The checkpoint that knows its task; setups may share one."""
    options: tuple[str, ...] = ()
    """What makes the untrained checkpoint."""
    changes: dict[str, str] = field(default_factory=dict)
    """Lines of the recipe that are not the template's, by the start of each."""


LONG = {
    "train_iters": "train_iters = 64\neval_interval = 64\neval_samples = 64",
}
"""Long enough for the gates of the end of a run, with a held-out loss."""
SETUPS = {
    "qwen3_vl": Setup(family="qwen3_vl", tiny="tiny-qwen3_vl", tuned="tuned-qwen3_vl"),
    "qwen2_5_vl": Setup(family="qwen2_5_vl", tiny="tiny-qwen2_5_vl", tuned="tuned-qwen2_5_vl"),
    "qwen3_vl_moe": Setup(
        family="qwen3_vl", tiny="tiny-qwen3_vl_moe", tuned="tuned-qwen3_vl_moe", options=("--moe",)
    ),
    "qwen3_vl_long": Setup(family="qwen3_vl", tiny="tiny-qwen3_vl", tuned="tuned-qwen3_vl", changes=LONG),
}
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
    make_dataset(shop, "scenes")
    for setup in setups:
        _prepare_checkpoint(shop, SETUPS[setup])
    return shop


def make_dataset(shop: Workshop, preset: str) -> None:
    """Draw a synthetic dataset, unless it is there."""
    folder = shop.folder / "datasets" / preset
    if not folder.exists():
        run_module(["models.entry.prepare", "synth", "--preset", preset, "--output", str(folder)])


def _prepare_checkpoint(shop: Workshop, setup: Setup) -> None:
    tuned, untrained = shop.checkpoint(setup.tuned), shop.checkpoint(setup.tiny)
    if tuned.exists():
        return
    if not untrained.exists():
        run_module(["models.entry.convert", "tiny", str(untrained), "--family", setup.family, *setup.options])
    name = setup.tuned.replace("tuned", "pretrain")
    recipe = write_recipe(shop, name, "_pretrain.toml", family=setup.family, checkpoint=setup.tiny)
    job = Job(name=name, recipe=recipe, run_dir=shop.run_dir(name), site=shop.site)
    train([job], shop)
    run_module(
        ["models.entry.convert", "megatron-to-hf", str(job.run_dir), str(tuned), "--hf", str(untrained)]
    )


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
    row = SETUPS[setup]
    return write_recipe(
        shop, setup, "_fine_tune.toml", family=row.family, checkpoint=row.tuned, changes=row.changes
    )


def fault_jobs(shop: Workshop, faults: list[Fault]) -> list[Job]:
    """A launch for every fault that shows in training."""
    return [_fault_job(shop, fault) for fault in faults if fault.area in TRAINED_AREAS]


def _fault_job(shop: Workshop, fault: Fault) -> Job:
    site = shop.site
    if fault.area == "conversion":
        folder = shop.folder / "faulty" / fault.name
        site = folder / "site.toml"
        if not site.exists():
            name = SETUPS[fault.setup].tuned
            shutil.rmtree(folder, ignore_errors=True)
            write_faulty_checkpoint(shop.checkpoint(name), folder / name, fault.name)
            _write_site(site, folder, shop.folder / "datasets")
    return Job(
        name=fault.name,
        recipe=fine_tune_recipe(shop, fault.setup),
        run_dir=shop.run_dir(f"fault-{fault.name}"),
        site=site,
        fault=None if fault.area == "conversion" else fault.name,
    )


def healthy_jobs(
    shop: Workshop, *, num_seeds: int, num_tensor_parallel: int, num_long: int
) -> dict[str, list[Job]]:
    """Healthy launches, in groups of one seed and length.

    In a group: two thread counts, four micro-batch sizes, and two tensor-parallel ranks for the first seeds.
    """
    groups: dict[str, list[Job]] = {}
    for seed in range(1, num_seeds + 1):
        variants = VARIANTS | (TENSOR_PARALLEL if seed <= num_tensor_parallel else {})
        groups[f"seed-{seed}"] = _variant_jobs(shop, f"seed-{seed}", "qwen3_vl", seed, variants)
    for seed in range(1, num_long + 1):
        groups[f"long-{seed}"] = _variant_jobs(shop, f"long-{seed}", "qwen3_vl_long", seed, LONG_VARIANTS)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What may change without a healthy run changing by more than rounding."""

    changes: dict[str, str] = field(default_factory=dict)
    num_threads: int = 1
    num_processes: int = 1


def _micro(size: int) -> dict[str, str]:
    return {"micro_batch_size": f"micro_batch_size = {size}"}


LONG_VARIANTS = {
    "threads-1": Variant(),
    "threads-2": Variant(num_threads=2),
    "micro-2": Variant(changes=_micro(2)),
    "micro-8": Variant(changes=_micro(8)),
}
VARIANTS = LONG_VARIANTS | {
    "micro-1": Variant(changes=_micro(1)),
    "micro-2-threads-2": Variant(changes=_micro(2), num_threads=2),
    "micro-8-threads-2": Variant(changes=_micro(8), num_threads=2),
}
TENSOR_PARALLEL = {
    "tp-2": Variant(
        changes={
            "hardware": 'hardware = ["cpu"]\nnum_processes = 2',
            "[checkpoint]": "[parallel]\ntensor_model_parallel_size = 2\n[checkpoint]",
        },
        num_processes=2,
    )
}


def _variant_jobs(
    shop: Workshop, group: str, setup: str, seed: int, variants: dict[str, Variant]
) -> list[Job]:
    jobs, row = [], SETUPS[setup]
    for name, variant in variants.items():
        full = f"{group}-{name}"
        seeded = {"global_batch_size": f"global_batch_size = 8\nseed = {1000 + seed}"}
        recipe = write_recipe(
            shop, full, "_fine_tune.toml", family=row.family, checkpoint=row.tuned,
            changes=row.changes | variant.changes | seeded,
        )  # fmt: skip
        jobs.append(
            Job(
                name=full, recipe=recipe, run_dir=shop.run_dir(full), site=shop.site,
                num_threads=variant.num_threads, num_processes=variant.num_processes,
            )
        )  # fmt: skip
    return jobs


def has_ended(job: Job) -> bool:
    """Whether the run is over, well or badly. One that was killed half-way is not, and runs again."""
    if (job.run_dir / ERROR_FILE).exists():
        return True
    if not (job.run_dir / RUN_FILE).exists():
        return False
    return read_run_info(job.run_dir).outcome.status in {"completed", "failed"}


def train(jobs: list[Job], shop: Workshop, *, num_workers: int = 1) -> None:
    """Run what has not run yet, some side by side. A run that fails says so in its run directory."""
    waiting = [job for job in jobs if not has_ended(job)]
    for job in waiting:
        shutil.rmtree(job.run_dir, ignore_errors=True)
    single = [job for job in waiting if job.num_processes == 1]
    slices = [part for worker in range(num_workers) if (part := single[worker::num_workers])]
    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        list(pool.map(_train_slice, slices, [shop.folder / f"jobs-{n}.json" for n in range(len(slices))]))
    for job in waiting:
        if job.num_processes > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(job.num_processes)]
            files = ["--recipe", str(job.recipe), "--run-dir", str(job.run_dir), "--site", str(job.site)]
            run_module([*launcher, "-m", "models.entry.train", *files])


def _train_slice(jobs: list[Job], plan: Path) -> None:
    """One process that imports what is heavy once, and forks a child a job."""
    listed = [
        {
            "fault": job.fault,
            "recipe": str(job.recipe),
            "run_dir": str(job.run_dir),
            "site": str(job.site),
            "num_threads": job.num_threads,
        }
        for job in jobs
    ]
    plan.write_text(json.dumps(listed, indent=1), encoding="utf-8")
    run_module(["suites.detection.train_with_fault", str(plan)])


def _write_site(path: Path, checkpoints: Path, datasets: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'checkpoints = "{checkpoints}"\ndatasets = "{datasets}"\nscratch = "{path.parent}"\n',
        encoding="utf-8",
    )


def run_module(module: list[str]) -> None:
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
