# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between Hugging Face and Megatron, and compare them.

Exit codes: 0 done or equal, 1 not equal or something wrong with the input (one line says what), 2 wrong usage,
130 interrupted.
"""

import ctypes
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from models.common.weight_rules import ExpertLayout
from models.contract.architecture import FAMILIES, Family
from models.contract.errors import ConfigError, HarnessError
from models.contract.tiny_config import sized_config
from models.contract.whole_file import write_whole
from models.conversion import convert as conversions
from models.conversion import dcp
from models.conversion.convert import Options, Summary
from models.conversion.dcp_folder import find_iteration
from models.conversion.progress import byte_progress
from models.conversion.recorded_checksums import check_recorded
from models.conversion.tensor_source import few
from models.conversion.tiny import Init, write_tiny_checkpoint
from models.conversion.verify import verify as compare

PROGRAM = os.environ.get("QWEN_HARNESS_PROG", "python -m models.entry.convert")
app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Convert checkpoints between Hugging Face, Megatron and MindSpeed-MM, bit for bit, and compare them.",
)  # fmt: skip
DtypeName = Literal["source", "fp32", "bf16", "fp16"]
DTYPES: dict[DtypeName, torch.dtype | None] = {
    "source": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
}  # fmt: skip

Dtype = Annotated[
    DtypeName, typer.Option(help="number format of the result; source: as it is in the HF checkpoint")
]
Experts = Annotated[
    ExpertLayout | None,
    typer.Option(
        "--expert-layout", help="how the HF checkpoint stores experts, where shapes cannot tell (H = 2I)"
    ),
]
Finite = Annotated[bool, typer.Option("--finite", help="refuse NaN and infinity instead of reporting them")]
WORKERS = min(8, os.cpu_count() or 2)
Workers = Annotated[
    int, typer.Option(min=1, help="how many work at once; default: one for each processor, at most 8")
]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""
Share = Annotated[
    str,
    typer.Option(
        metavar="K/N",
        help="write only every N-th file, from the K-th on: one share for each node, same target",
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="throw a partial result away instead of continuing it")
]
Template = Annotated[
    Path,
    typer.Option("--hf", help="HF checkpoint that training started from: names, shards, config, tokenizer"),
]
DcpSource = Annotated[
    Path, typer.Argument(help="DCP: an iteration's folder, or its parent with the tracker file")
]
DcpStyle = Annotated[dcp.Style, typer.Option(help="names: model.model.NAME (2025) or model.NAME (2026)")]
TieWeight = Annotated[bool, typer.Option("--tie-weight", help="store a tied output layer as well")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing")]


def run_conversion(
    convert: Callable[[Options], Summary],
    *,
    dtype: Dtype = "source",
    expert_layout: Experts = None,
    finite: Finite = False,
    workers: Workers = WORKERS,
    share: Share = "0/1",
    restart: Restart = False,
    dry_run: DryRun = False,
) -> None:
    """Convert with a progress bar and say what was done. Its keywords are options of every conversion."""
    with byte_progress("converting") as (start, advance):
        options = Options(
            dtype=DTYPES[dtype], experts=expert_layout, finite=finite, workers=workers, share=parse_share(share),
            restart=restart, dry_run=dry_run, on_start=start, advance=advance,
        )  # fmt: skip
        summary = convert(options)
    for line in summary_lines(summary, dry_run=dry_run):
        typer.echo(line)


def conversion(function: Callable[..., Summary]) -> Callable[..., None]:
    """Register a command that takes its own arguments and, for its last one, the options of every conversion."""
    own = [arg for arg in signature(function).parameters.values() if arg.name != "options"]
    shared = list(signature(run_conversion).parameters.values())[1:]

    @wraps(function)
    def command(**values: Any) -> None:
        mine = {arg.name: values.pop(arg.name) for arg in own}
        run_conversion(lambda options: function(**mine, options=options), **values)

    arguments = [arg.replace(kind=Parameter.KEYWORD_ONLY) for arg in (*own, *shared)]
    command.__signature__ = Signature(arguments)  # type: ignore[attr-defined] - typer reads both
    command.__annotations__ = {arg.name: arg.annotation for arg in arguments}
    return app.command()(command)


@conversion
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(help="HF checkpoint folder")],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    *,
    options: Options,
) -> Summary:
    """Convert a HF folder to Megatron's torch_dist, loadable at any TP/PP/EP layout.

    Example: convert hf-to-megatron checkpoints/Qwen3-VL-8B checkpoints/Qwen3-VL-8B-megatron --dtype bf16
    """
    return conversions.hf_to_megatron(source, target, options)


@conversion
def megatron_to_hf(
    source: Annotated[
        Path, typer.Argument(help="torch_dist checkpoint: an iteration's folder, its parent, or a run")
    ],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    hf: Template,
    *,
    options: Options,
) -> Summary:
    """Convert a torch_dist checkpoint to a HF folder with the names, shards and files of another one.

    Example: convert megatron-to-hf runs/8b/checkpoints/iter_0000500 out/8b-tuned --hf checkpoints/Qwen3-VL-8B
    """
    return conversions.megatron_to_hf(source, target, hf, options)


@conversion
def hf_to_dcp(
    source: Annotated[Path, typer.Argument(help="HF checkpoint folder")],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    style: DcpStyle = "2025",
    tie_weight: TieWeight = False,
    merge_experts: Annotated[
        bool,
        typer.Option(
            "--merge-experts", help="merge experts stored one by one (Qwen3-Omni), as ExpertMergeDcpConverter"
        ),
    ] = False,
    *,
    options: Options,
) -> Summary:
    """Convert a HF folder to MindSpeed-MM's DCP.

    Example: convert hf-to-dcp checkpoints/Qwen3-VL-8B checkpoints/Qwen3-VL-8B-dcp --style 2026
    """
    return dcp.hf_to_dcp(
        source, target, options, style=style, tie_weight=tie_weight, merge_experts=merge_experts
    )


@conversion
def dcp_to_hf(
    source: DcpSource,
    target: Annotated[Path, typer.Argument(help="folder to make")],
    hf: Template,
    *,
    options: Options,
) -> Summary:
    """Convert MindSpeed-MM's DCP to a HF folder with the names, shards and files of another one.

    Example: convert dcp-to-hf save/dir out/8b-tuned --hf checkpoints/Qwen3-VL-8B
    """
    return dcp.dcp_to_hf(source, target, hf, options)


@conversion
def dcp_to_megatron(
    source: DcpSource,
    target: Annotated[Path, typer.Argument(help="folder to make")],
    hf: Template,
    *,
    options: Options,
) -> Summary:
    """Convert MindSpeed-MM's DCP to Megatron's torch_dist.

    Example: convert dcp-to-megatron save/dir checkpoints/8b-megatron --hf checkpoints/Qwen3-VL-8B
    """
    return dcp.dcp_to_megatron(source, target, hf, options)


@conversion
def megatron_to_dcp(
    source: Annotated[
        Path, typer.Argument(help="torch_dist checkpoint: an iteration's folder, its parent, or a run")
    ],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    hf: Template,
    style: DcpStyle = "2025",
    tie_weight: TieWeight = False,
    *,
    options: Options,
) -> Summary:
    """Convert Megatron's torch_dist to MindSpeed-MM's DCP.

    Example: convert megatron-to-dcp runs/8b out/8b-dcp --hf checkpoints/Qwen3-VL-8B
    """
    return dcp.megatron_to_dcp(source, target, hf, options, style=style, tie_weight=tie_weight)


@app.command()
def verify(
    left: Annotated[Path, typer.Argument(help="what is expected: HF folder or torch_dist checkpoint")],
    right: Annotated[
        Path | None,
        typer.Argument(
            help="what is checked: HF folder or torch_dist checkpoint; without it LEFT is compared with the "
            "checksums that its conversion recorded"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the JSON report here (a report shows conversion.json)")
    ] = None,
    cast: Annotated[
        bool, typer.Option("--cast", help="compare after converting LEFT to RIGHT's number format")
    ] = False,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits",
            help="also compare logits with transformers on a fixed multimodal batch, in fp32 and bf16; needs memory "
            "for the whole model in fp32",
        ),
    ] = False,
    expert_layout: Experts = None,
    workers: Workers = WORKERS,
) -> None:
    """Compare two checkpoints bit by bit: keys, shapes, number formats, values. Exit code 1 if they differ.

    \b
    Examples:
      convert verify checkpoints/Qwen3-VL-8B out/8b-exported --out reports/conversion.json
      convert verify checkpoints/Qwen3-VL-8B checkpoints/Qwen3-VL-8B-megatron --logits
      convert verify checkpoints/Qwen3-VL-8B-megatron
    """  # noqa: D301 - \b is typer's mark for a block that is not re-wrapped
    if right is None:
        _verify_recorded(left, out, workers, needs_right=cast or logits or expert_layout is not None)
        return
    with byte_progress("comparing") as (start, advance):
        report = compare(
            left, right, workers=workers, experts=expert_layout, cast=cast, on_start=start, advance=advance
        )
    report["logits"] = []
    if logits and not (report["missing"] or report["unexpected"]):  # else there is no model to run
        from models.entry.logits import verify_logits  # loads transformers and Megatron

        report["logits"] = [asdict(row) for row in verify_logits(left, right)]
    if out is not None:
        _write_report(report, out)
    for line in report_lines(report):
        typer.echo(line)
    if not report["is_equal"] or not all(row["is_close"] for row in report["logits"]):
        raise typer.Exit(1)


def _verify_recorded(folder: Path, out: Path | None, workers: int, *, needs_right: bool) -> None:
    """Compare a checkpoint with the checksums that its conversion recorded."""
    if needs_right:
        raise ConfigError(
            "RIGHT is missing", where="verify", got="--cast, --logits or --expert-layout with one checkpoint",
            fix="give the checkpoint to compare with, or leave these options out",
        )  # fmt: skip
    with byte_progress("hashing") as (start, advance):
        report = check_recorded(find_iteration(folder), workers=workers, on_start=start, advance=advance)
    if out is not None:
        _write_report(report, out)
    typer.echo(
        f"{report['num_equal']} of {report['num_tensors']} recorded checksums hold "
        f"({report['num_files']} files, {report['num_bytes'] / 1e9:.3f} GB)"
    )
    for row in report["different"][:10]:
        typer.echo(f"different   {row['name']}: {row['detail']}")
    for kind in ("missing", "unexpected"):
        if report[kind]:
            typer.echo(f"{kind:<11} {len(report[kind])}: {few(report[kind])}")
    if not report["is_equal"]:
        raise typer.Exit(1)


def _write_report(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(report, indent=1) + "\n")


@app.command()
def tiny(
    target: Annotated[Path, typer.Argument(help="folder to make")],
    family: Annotated[Family, typer.Option(help=", ".join(FAMILIES))],
    moe: Annotated[bool, typer.Option("--moe", help="mixture of experts (Qwen3-VL)")] = False,
    size: Annotated[
        str | None,
        typer.Option(help="a published size (qwen3_vl_2b, …) instead of tiny ones, same tokenizer"),
    ] = None,
    init: Annotated[
        Init, typer.Option(help="training: learns from scratch; random: for parity; coded: for conversion")
    ] = ("training"),
    seed: Annotated[int, typer.Option(help="seed of training and random weights")] = 0,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="number format")] = "fp32",
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="leave them out: for recipes that draw their own")
    ] = False,
) -> None:
    """Write a tiny, complete HF checkpoint: weights in shards, tokenizer, template, processors.

    Example: convert tiny checkpoints/tiny-qwen3-vl --family qwen3_vl
    Example: convert tiny checkpoints/sized-2b --family qwen3_vl --size qwen3_vl_2b --dtype bf16
    Example: convert tiny checkpoints/config-8b --family qwen3_vl --size qwen3_vl_8b --no-weights
    """
    format_ = DTYPES[dtype]
    assert format_ is not None
    config = None if size is None else sized_config(size)
    write_tiny_checkpoint(
        target,
        family,
        seed=seed,
        moe=moe,
        init=init,
        dtype=format_,
        config=config,
        has_weights=not no_weights,
    )
    typer.echo(f"wrote {target}")


def report_lines(report: dict[str, Any]) -> list[str]:
    """A comparison in a few lines."""
    lines = [
        f"{report['num_equal']} of {report['num_tensors']} tensors are equal ({report['num_bytes'] / 1e9:.3f} GB)"
    ]
    lines += [f"different   {row['name']}: {row['detail']}" for row in report["different"][:10]]
    for kind in ("missing", "unexpected", "not_finite"):
        if report[kind]:
            lines.append(f"{kind:<11} {len(report[kind])}: {few(report[kind])}")
    lines += [f"declared    {name}: {why}" for name, why in list(report["declared"].items())[:10]]
    return lines + [logits_line(row) for row in report["logits"]]


def logits_line(row: dict[str, Any]) -> str:
    """One number format's comparison of logits with transformers."""
    verdict = "close to" if row["is_close"] else "DIFFERENT from"
    beside = f" (transformers: {row['reference_rms_error']:.1e})" if row["reference_rms_error"] else ""
    return (
        f"logits {row['dtype']} {verdict} transformers' fp32: largest error {row['max_error']:.1e}, rms "
        f"{row['rms_error']:.1e}{beside}, limit {row['limit']:.1e}, same token at {row['same_token']:.1%} of "
        f"{row['num_real_tokens']} positions"
    )


def summary_lines(summary: Summary, *, dry_run: bool) -> list[str]:
    """A conversion in a few lines."""
    lines = [
        f"{summary.family}: {summary.layout}",
        f"{summary.num_tensors} tensors, {summary.num_bytes / 1e9:.3f} GB in {summary.num_files} files",
    ]
    if summary.num_untouched:
        lines.append(f"{summary.num_untouched} tensors that training does not touch are copied by export")
    if summary.not_finite:
        lines.append(f"NaN or infinity in {len(summary.not_finite)} tensors: {few(list(summary.not_finite))}")
    if dry_run:
        return [*lines, f"would write {summary.target}"]
    ending = f"wrote {summary.target}" if summary.complete else "this share is done; the others are not"
    return [*lines, ending]


def parse_share(text: str) -> tuple[int, int]:
    """`K/N` as two numbers. Raises ConfigError unless 0 <= K < N."""
    first, slash, second = text.partition("/")
    if slash and first.isdigit() and second.isdigit() and int(first) < int(second):
        return int(first), int(second)
    raise ConfigError(
        "wrong share", where="--share", expected="K/N with 0 <= K < N, for example 0/4", got=text
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("megatron", "torch", "transformers", "nv_one_logger", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)  # the workers are the parallelism
    _keep_memory()
    torch.serialization.set_crc32_options(False)  # every block is read back and compared instead
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name=PROGRAM)
    except HarnessError as error:
        typer.echo(str(error), err=True)
        return 1
    except OSError as error:  # a source that cannot be read, a name that no file can have
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_:
        return _interrupted() if exit_.code == 130 else int(exit_.code or 0)
    return 0


def _keep_memory() -> None:
    """Let blocks be taken from memory that was freed before, not from the kernel again and again; glibc only."""
    # Otherwise blocks of 8 MiB are mapped and unmapped, and every page is faulted in and cleared each time:
    # 500,000 faults instead of 100,000 for 3.35 GB, and 0.7 s more of the system's time.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that its manual allows
        mallopt(M_TRIM_THRESHOLD, 2**28)


def _interrupted() -> int:
    typer.echo(
        "interrupted: nothing is under the final name; the same command continues where this stopped",
        err=True,
    )
    return 130


if __name__ == "__main__":
    sys.exit(main())
