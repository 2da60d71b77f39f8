# SPDX-License-Identifier: Apache-2.0
"""Data commands for tars that exist: index, migrate, inspect."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from models.contract.errors import DataError
from models.entry.prepare_options import (
    Output,
    ShardSize,
    ValFraction,
    Workers,
    console,
    parse_pair,
    parse_ratios,
    progress,
    write_entries,
)


def datajuicer(
    folder: Annotated[Path, typer.Argument(help="Folder with the tars that DataJuicer exported.")],
    split: Annotated[str, typer.Option(help="Shares of train, val and test, by tar.")] = "9,1,0",
    workers: Workers = 4,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken tars out.")] = False,
) -> None:
    """Metadata for tars that exist: no sample is touched.

    DataJuicer's chat export keeps media as pickles; `migrate` rewrites such tars without them, which training needs.

    Example: datajuicer /data/dj-output --split 9,1,0
    """
    from models.datasets.prepare.legacy import has_pickles
    from models.datasets.shards import index_dataset

    counts = index_dataset(folder, ratios=parse_ratios(split), workers=workers, skip_broken=skip_broken)
    console.print(f"indexed {sum(counts.values())} samples in {len(counts)} tars of {folder}")
    if has_pickles(folder / next(iter(counts))):
        console.print("media are pickles: run `migrate` to make a dataset that training reads")


def migrate(
    folder: Annotated[Path, typer.Argument(help="Folder with old chat tars (pickled jpgs, mp4s, mp3s …).")],
    output: Output,
    val_fraction: ValFraction = 0.01,
    shard_size: ShardSize = 1000,
    workers: Workers = 2,
) -> None:
    """Rewrite chat tars whose media are pickles. Refuses to unpickle anything but lists of bytes.

    Example: migrate /data/old-wds -o work/datasets/chats
    """
    from models.datasets.prepare.legacy import convert_legacy, list_legacy

    tars = sorted(folder.rglob("*.tar"))
    if not tars:
        raise DataError("no tars", where=str(folder))
    about = {"command": "migrate", "source": str(folder)}
    write_entries(
        output, list_legacy(tars), convert_legacy, about, val_fraction, shard_size, workers,
        key_of=lambda entry: f"{entry.tar.name}/{entry.key}",
    )  # fmt: skip


def index(
    folder: Annotated[Path, typer.Argument(help="Folder with tars.")],
    split: Annotated[
        str | None, typer.Option(help="Shares of train, val and test, by tar, such as 9,1,0.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="SPLIT=REGEX over tar names, instead of --split; give it several times."),
    ] = None,
    sample_class: Annotated[
        str, typer.Option(help="CrudeWebdataset, or an energon sample such as VQASample.")
    ] = "CrudeWebdataset",
    field: Annotated[
        list[str] | None, typer.Option(help="NAME=MEMBER of the field map, such as image=jpg.")
    ] = None,
    shuffle_seed: Annotated[int, typer.Option(help="Order in which tars are given to splits.")] = 42,
    workers: Workers = 4,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken tars out.")] = False,
) -> None:
    """Write what `energon prepare` asks for: split, sample class, field map.

    Example: index LLaVA-Pretrain/wds --split 9,1,0 --sample-class VQASample --field image=jpg
    --field "context=json[0][value]" --field "answers=json[1][value]"
    """
    from models.datasets.shards import CRUDE, index_dataset

    if sample_class == "CrudeWebdataset":
        if field:
            raise DataError(
                "a field map without a sample class", fix="give --sample-class, such as VQASample"
            )
        dataset = CRUDE
    else:
        import megatron.energon

        if not hasattr(megatron.energon, sample_class):
            raise DataError("unknown sample class", got=sample_class, expected="a class of megatron.energon")
        dataset = {
            "sample_type": {"__module__": "megatron.energon", "__class__": sample_class},
            "field_map": dict(parse_pair(item) for item in field or []),
        }
    patterns = dict(parse_pair(item) for item in pattern) if pattern else None
    ratios = None if patterns else parse_ratios(split or "9,1,0")
    counts = index_dataset(
        folder, patterns=patterns, ratios=ratios, shuffle_seed=shuffle_seed, dataset=dataset, workers=workers,
        skip_broken=skip_broken,
    )  # fmt: skip
    console.print(f"indexed {sum(counts.values())} samples in {len(counts)} tars of {folder}")


def inspect(
    folder: Annotated[Path, typer.Argument(help="Indexed dataset.")],
    split: Annotated[str, typer.Option(help="Split to look at.")] = "train",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder: count and show what it makes of the samples.")
    ] = None,
    seq_length: Annotated[int, typer.Option(min=16, help="Limit that counts as over length.")] = 8192,
    loss_mask: Annotated[
        Literal["assistant", "vqa_reference"], typer.Option(help="Mask to show.")
    ] = "assistant",
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first samples only.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here: .html, or .png.")] = None,
    sheet_samples: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 24,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Counts, lengths, histograms, broken samples, and a contact sheet with decoded turns and masks.

    Example: inspect work/datasets/scenes --checkpoint work/checkpoints/tiny --sheet sheet.html
    """
    from models.datasets.inspection import inspect_dataset, render_report
    from models.datasets.sheet import write_sheet

    with progress("looking") as tick:
        result = inspect_dataset(
            folder, split, checkpoint=checkpoint, seq_length=seq_length, loss_mask=loss_mask, limit=limit,
            keep=sheet_samples if sheet else 0, on_progress=tick,
        )  # fmt: skip
    if sheet is not None:
        write_sheet(sheet, result)
    out = Console()
    if as_json:
        out.print_json(json.dumps(result.to_dict()))
    else:
        render_report(result, out)
