# SPDX-License-Identifier: Apache-2.0
"""The verbs that run in this process: planning, running, judging, reporting. None of them imports torch."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli import baseline, compat, judge, machine
from models.contract.cluster import read_cluster

GateOption = Literal["tost", "literal", "off"]
SchedulerOption = Literal["dsw", "dlc", "slurm", "hosts"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Is training still right, and is it still fast? A verdict that CI can gate on.",
    epilog="Exit codes: 0 pass · 10 regression · 11 invalid · 12 inconclusive · 13 no baseline · 14 wrong machine · "
    "15 infrastructure · 2 usage · 3 bad input · 130 interrupted",
)
app.add_typer(baseline.app, name="baseline")
app.add_typer(compat.app, name="compat")

CasesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CASE]...", help="Case ids (`suite/name@hardware`), suites, or recipe files; all if none."
    ),
]
HardwareOption = Annotated[
    str | None,
    typer.Option("--hw", "--hardware", metavar="CLASS", help="Only cases of this hardware class."),
]
SiteOption = Annotated[
    Path | None,
    typer.Option("--site", metavar="FILE", help="Site file (default: $QWEN_HARNESS_SITE, site.toml)."),
]
BaselineDirOption = Annotated[
    Path | None,
    typer.Option("--baseline-dir", metavar="DIR", help="Baselines to compare with (default: baselines/)."),
]
GateModeOption = Annotated[
    GateOption,
    typer.Option(
        "--gate", help="What decides about the loss: equivalence test, single last point, or nothing."
    ),
]
WindowOption = Annotated[
    str | None,
    typer.Option(
        "--window",
        metavar="FIRST:LAST",
        help="Iterations of the end-window test, or how many of the last (default: the policy's last 50).",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="Tolerance policy (default: the reviewed one)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def doctor(site: SiteOption = None, json: JsonOption = False) -> None:
    """Look at this machine: device class, versions, folders, free disk.

    Example: `qwen-harness doctor`
    """
    raise typer.Exit(machine.doctor(site, as_json=json))


@app.command()
def plan(cases: CasesArgument = None, hw: HardwareOption = None, site: SiteOption = None) -> None:
    """Print what would run: commands, device-hours, memory a device, disk, missing inputs. Starts nothing.

    A recipe file or case that cannot run ends in exit code 3, with the smallest change that fits. A recipe file is
    planned for any class.

    Example: `qwen-harness plan convergence --hw h20`

    Example: `qwen-harness plan my_recipe.toml --hardware h200`
    """
    machine.plan(cases or [], hw, site)


@app.command()
def run(
    cases: CasesArgument = None,
    hw: HardwareOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="CPU cases that train side by side.")] = 1,
    time_budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop a launch that takes longer.")
    ] = None,
    sentinel: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="Measure the machine this long before and after each run (default: 10 on accelerators; 0: never).",
        ),
    ] = None,
    run_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the runs (default: runs/TIME).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the report (default: reports/TIME)."),
    ] = None,
    gate: GateModeOption = "tost",
    window: WindowOption = None,
    baseline_dir: BaselineDirOption = None,
    scheduler: Annotated[
        SchedulerOption,
        typer.Option(
            help="Where the nodes are: `dsw` this one; `dlc` WORLD_SIZE and RANK count nodes; `slurm`; `hosts` --hosts."
        ),
    ] = "dsw",
    hosts: Annotated[
        str, typer.Option(metavar="A,B", help="Hosts of the run, the first leads; for `--scheduler hosts`.")
    ] = "",
    this_host: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of them this is (default: its host name).")
    ] = None,
    site: SiteOption = None,
) -> None:
    """Train cases, judge them, build the report.

    On several nodes, start the same command on each, with a `--run-root` that they share; the first node judges.

    Example: `qwen-harness run convergence --hw cpu --jobs 2`

    Example: `srun --ntasks-per-node 1 qwen-harness run recipe.toml --hw h200 --scheduler slurm --run-root /shared/run`
    """
    names = tuple(filter(None, (name.strip() for name in hosts.split(","))))
    options = machine.session_options(
        run_root=run_root, site_file=site, baseline_dir=baseline_dir, gate_mode=gate, window=window,
        time_budget_s=time_budget, sentinel_s=sentinel,
        cluster=read_cluster(scheduler, os.environ, hosts=names, this_host=this_host),
    )  # fmt: skip
    raise typer.Exit(machine.run(cases or [], hw, options, jobs=jobs, report_dir=output))


@app.command()
def smoke(
    run_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the runs (default: runs/TIME).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the report (default: reports/smoke)."),
    ] = None,
    site: SiteOption = None,
) -> None:
    """The main job on tiny models, without GPU: convert, fine-tune 500 iterations, judge, report.

    Example: `qwen-harness smoke`
    """
    raise typer.Exit(machine.smoke(run_root, output, site))


@app.command()
def grade(
    run_or_log: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run directory, log or event files.")
    ] = None,
    from_log: Annotated[
        Path | None,
        typer.Option("--from-log", metavar="FILE", help="The same, by name: any stack's training log."),
    ] = None,
    hw: Annotated[
        str | None, typer.Option("--hw", metavar="CLASS", help="Hardware class the run claims.")
    ] = None,
    gate: GateModeOption = "tost",
    window: WindowOption = None,
    against: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="Compare with this baseline, whatever fits else."),
    ] = None,
    baseline_dir: BaselineDirOption = None,
    policy: PolicyOption = None,
    write: Annotated[bool, typer.Option(help="Write verdict.json beside a run directory's files.")] = True,
    json: JsonOption = False,
) -> None:
    """Judge a run directory or any log; exit with the verdict's code. Needs no GPU.

    Example: `qwen-harness grade runs/20260101-120000-7/convergence/tiny@cpu`

    Example: `qwen-harness grade --from-log train.log --gate literal`
    """
    source = judge.one_of(run_or_log, from_log)
    options = machine.session_options(
        baseline_dir=baseline_dir, gate_mode=gate, window=window, policy_file=policy
    )
    raise typer.Exit(
        judge.grade_path(source, options, hardware=hw, against=against, write=write, as_json=json)
    )


@app.command()
def compare(
    run_a: Annotated[
        Path, typer.Argument(metavar="A", help="Run to judge: run directory, log or event files.")
    ],
    run_b: Annotated[Path, typer.Argument(metavar="B", help="Run to compare with.")],
    gate: GateModeOption = "tost",
    window: WindowOption = None,
    policy: PolicyOption = None,
    json: JsonOption = False,
) -> None:
    """Judge run A as if run B were its baseline.

    Example: `qwen-harness compare runs/new runs/old`
    """
    raise typer.Exit(
        judge.compare_paths(run_a, run_b, gate_mode=gate, window=window, policy_file=policy, as_json=json)
    )


@app.command()
def diverge(
    run_a: Annotated[
        Path, typer.Argument(metavar="A", help="Run directory, which is read, or recipe, which is trained.")
    ],
    run_b: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    steps: Annotated[int, typer.Option(min=1, help="Iterations that a recipe is trained for.")] = 3,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative distance that counts as equal (default: 1e-4 in fp32, 3e-2 in bf16)."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of what is trained (default: runs/diverge-TIME)."),
    ] = None,
    site: SiteOption = None,
) -> None:
    """Name the first step, module and tensor where two runs part, forward and backward. Exit code 10 if they do.

    The runs may be two engines, two layouts or two commits. The step where their metrics part is trained once more on
    both sides, with its tensors recorded; a run that was trained with `--trace` there is read as it is.

    Example: `qwen-harness diverge suites/cross_engine/tiny_qwen3_vl.toml suites/cross_engine/tiny_qwen3_vl_fsdp2.toml`

    Example: `qwen-harness diverge runs/before runs/after`
    """
    raise typer.Exit(machine.diverge(run_a, run_b, work, steps=steps, tolerance=tolerance, site_file=site))


@app.command()
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders with some below.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the report (default: reports/<name>)."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Headline of the report.")] = None,
) -> None:
    """Build the report: HTML in English and Chinese, Markdown, JSON; every file stands alone.

    Example: `qwen-harness report runs/20260101-120000-7`
    """
    typer.echo(judge.build(paths, output, title))


def _handed_over(name: str, text: str) -> None:
    """List a verb in the help; :func:`harness.cli.main` hands it over before this parser sees it."""

    def never_called() -> None:
        raise AssertionError(name)

    app.command(name, help=text)(never_called)


_handed_over(
    "convert", "Convert checkpoints: Hugging Face, Megatron torch_dist. `qwen-harness convert --help`"
)
_handed_over("data", "Prepare datasets, draw synthetic scenes. `qwen-harness data --help`")
_handed_over("generate", "Caption images with a checkpoint. `qwen-harness generate --help`")
