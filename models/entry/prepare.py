# SPDX-License-Identifier: Apache-2.0
"""Prepare datasets: ``python -m models.entry.prepare COMMAND …``, or ``qwen-harness data COMMAND …``.

Every command that writes makes a whole, indexed dataset or nothing; it can be stopped and run again, and it never
writes over something that is there.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.contract.errors import DataError, HarnessError

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Dataset folder to make; must not exist.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Samples of a shard.")]
ValFraction = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share held out for validation, by a hash of the key.")
]
Verify = Annotated[
    Literal["none", "header", "decode"],
    typer.Option(help="How closely images are looked at; bad ones are left out."),
]


@app.command()
def synth(
    output: Output,
    train: Annotated[int, typer.Option(min=1, help="Training samples.")] = 2000,
    val: Annotated[
        int, typer.Option(min=0, help="Held-out samples; never a scene of the training set.")
    ] = 128,
    preset: Annotated[
        Literal["scenes", "scenes-audio", "colours", "fake-vl", "fake-omni"],
        typer.Option(
            help="scenes: shapes to look at. colours: their colours alone. "
            "fake-*: the seeds' demonstrations, one sample many times."
        ),
    ] = "scenes",
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    shard_size: ShardSize = 500,
    workers: Workers = 1,
) -> None:
    """Draw a synthetic dataset of images, short videos and (scenes-audio) sounds.

    Example: synth -o work/datasets/scenes --train 2000 --val 128
    """
    from models.datasets.prepare.job import write_dataset
    from models.datasets.prepare.synthetic import ConvertScene

    splits = {"train": [("train", i) for i in range(train)], "val": [("val", i) for i in range(val)]}
    splits = {split: entries for split, entries in splits.items() if entries}
    about = {"command": "synth", "preset": preset, "seed": seed, "source": "synthetic"}
    with _progress("drawing") as tick:
        summary = write_dataset(
            output, splits, ConvertScene(preset, seed), about=about, shard_size=shard_size, workers=workers,
            on_progress=tick,
        )  # fmt: skip
    _report(output, summary)


app.command("synthetic", help="The same as synth.")(synth)


@app.command("llava-pretrain")
def llava_pretrain(
    source: Annotated[Path, typer.Argument(help="Folder of LLaVA-Pretrain.")],
    output: Output,
    annotations: Annotated[
        Path | None, typer.Option("--json", help="Default: blip_laion_cc_sbu_558k.json there.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder or zip of the images; default: SOURCE.")] = None,
    layout: Annotated[
        Literal["chat", "vqa"],
        typer.Option(help="vqa: the members and dataset.yaml that the reference writes."),
    ] = "chat",
    val_fraction: ValFraction = 0.01,
    shard_size: ShardSize = 10_000,
    workers: Workers = 2,
    verify: Verify = "header",
) -> None:
    """LLaVA-Pretrain: annotations and images to a dataset.

    Example: llava-pretrain LLaVA-Pretrain -o work/datasets/llava-pretrain --images LLaVA-Pretrain/images.zip
    """
    from models.datasets.prepare.llava import PRETRAIN_JSON, VQA_DATASET, ConvertLlava, unique_entries
    from models.datasets.prepare.source import check_overlap, open_source, read_json_list

    file = annotations or source / PRETRAIN_JSON
    entries = unique_entries(read_json_list(file))
    media = open_source(images or source)
    check_overlap(media, (str(e["image"]) for e in entries if e.get("image")), where=str(file))
    about = {"command": "llava-pretrain", "source": str(file), "images": str(media.root), "layout": layout}
    _write_entries(
        output, entries, ConvertLlava(media, layout, verify), about, val_fraction, shard_size, workers,
        dataset=VQA_DATASET if layout == "vqa" else None,
    )  # fmt: skip


@app.command()
def sharegpt(
    annotations: Annotated[Path, typer.Argument(help="JSON list or JSON lines of chats.")],
    output: Output,
    media: Annotated[
        Path | None, typer.Option(help="Folder or zip that paths count from; default: beside the JSON.")
    ] = None,
    val_fraction: ValFraction = 0.01,
    shard_size: ShardSize = 1000,
    workers: Workers = 2,
    verify: Verify = "header",
) -> None:
    """Chats with several turns, images, video files or frame folders, audio clips and system turns.

    Example: sharegpt chats.json -o work/datasets/chats --media /data/chats
    """
    from models.datasets.prepare.sharegpt import FIELDS, ConvertShareGpt, media_paths, with_ids
    from models.datasets.prepare.source import check_overlap, open_source, read_json_list
    from models.datasets.sample import SampleRejected

    entries = with_ids(read_json_list(annotations))
    source = open_source(media or annotations.parent)

    def names() -> Any:
        for entry in entries:
            for kind in FIELDS:
                try:
                    yield from media_paths(entry, kind)
                except SampleRejected:
                    continue

    check_overlap(source, names(), where=str(annotations))
    about = {"command": "sharegpt", "source": str(annotations), "media": str(source.root)}
    _write_entries(output, entries, ConvertShareGpt(source, verify), about, val_fraction, shard_size, workers)


@app.command("llava-instruct")
def llava_instruct(
    annotations: Annotated[Path, typer.Argument(help="llava_instruct_150k.json")],
    images: Annotated[
        Path, typer.Option(help="COCO 2017: the folder above train2017, that folder, or the zip.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Dataset folder to make.")] = None,
    mllm_json: Annotated[
        Path | None, typer.Option(help="Write {images, messages} records here too, or only.")
    ] = None,
    image_prefix: Annotated[str, typer.Option(help="Before image names in --mllm-json.")] = "./train2017/",
    val_fraction: ValFraction = 0.01,
    shard_size: ShardSize = 5000,
    workers: Workers = 2,
    verify: Verify = "header",
) -> None:
    """LLaVA-Instruct-150K with COCO 2017, to a dataset, to mllm JSON, or to both.

    Example: llava-instruct llava_instruct_150k.json --images COCO2017 -o work/datasets/llava-instruct
    """
    from models.datasets.prepare.llava import ConvertLlava, to_mllm, unique_entries
    from models.datasets.prepare.source import check_overlap, open_source, read_json_list

    if output is None and mllm_json is None:
        raise DataError("nothing to write", fix="give --output, --mllm-json, or both")
    entries = read_json_list(annotations)
    media = open_source(images)
    first = next((str(entry["image"]) for entry in entries if entry.get("image")), "")
    prefix = "train2017/" if not media.has(first or "-") else ""
    check_overlap(
        media, (prefix + str(e["image"]) for e in entries if e.get("image")), where=str(annotations)
    )
    if mllm_json is not None:
        if mllm_json.exists():
            raise DataError(
                "output exists", where=str(mllm_json), fix="choose another output, or remove it first"
            )
        records, skipped = to_mllm(entries, media, prefix=prefix, image_prefix=image_prefix)
        partial = mllm_json.with_name(mllm_json.name + ".partial")
        partial.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        partial.rename(mllm_json)
        console.print(f"wrote {len(records)} records to {mllm_json}, left out {len(skipped)}")
    if output is not None:
        about = {"command": "llava-instruct", "source": str(annotations), "images": str(images)}
        convert = ConvertLlava(media, "chat", verify, prefix)
        _write_entries(output, unique_entries(entries), convert, about, val_fraction, shard_size, workers)


@app.command()
def photos(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, in LLaVA's format.")],
) -> None:
    """Twelve real photographs that come with scikit-image, captioned, as a LLaVA-format folder.

    Example: photos -o work/raw/photos, then llava-pretrain work/raw/photos -o work/datasets/photos --val-fraction 0.1
    """
    from models.datasets.prepare.photos import write_photos

    console.print(f"wrote {write_photos(output)} entries to {output}")


@app.command()
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

    counts = index_dataset(folder, ratios=_ratios(split), workers=workers, skip_broken=skip_broken)
    console.print(f"indexed {sum(counts.values())} samples in {len(counts)} tars of {folder}")
    if has_pickles(folder / next(iter(counts))):
        console.print("media are pickles: run `migrate` to make a dataset that training reads")


@app.command()
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
    _write_entries(
        output, list_legacy(tars), convert_legacy, about, val_fraction, shard_size, workers,
        key_of=lambda entry: f"{entry.tar.name}/{entry.key}",
    )  # fmt: skip


@app.command()
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
            "field_map": dict(_pair(item) for item in field or []),
        }
    patterns = dict(_pair(item) for item in pattern) if pattern else None
    ratios = None if patterns else _ratios(split or "9,1,0")
    counts = index_dataset(
        folder, patterns=patterns, ratios=ratios, shuffle_seed=shuffle_seed, dataset=dataset, workers=workers,
        skip_broken=skip_broken,
    )  # fmt: skip
    console.print(f"indexed {sum(counts.values())} samples in {len(counts)} tars of {folder}")


@app.command()
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

    with _progress("looking") as tick:
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


def _write_entries(
    output: Path,
    entries: list[Any],
    convert: Any,
    about: dict[str, Any],
    val_fraction: float,
    shard_size: int,
    workers: int,
    *,
    dataset: dict[str, Any] | None = None,
    key_of: Any = lambda entry: entry["id"],
) -> None:
    from models.datasets.prepare.job import split_by_key, write_dataset

    splits = split_by_key(entries, key_of, val_fraction)
    with _progress("writing") as tick:
        summary = write_dataset(
            output, splits, convert, about={**about, "val_fraction": val_fraction}, shard_size=shard_size,
            workers=workers, on_progress=tick, dataset=dataset,
        )  # fmt: skip
    _report(output, summary)


def _report(output: Path, summary: Any) -> None:
    written = ", ".join(f"{count} {split}" for split, count in summary.written.items())
    reused = f", {summary.reused_shards} shards from before" if summary.reused_shards else ""
    console.print(f"wrote {written} to {output}{reused}")
    if summary.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in summary.reasons.most_common())
        console.print(f"left out {len(summary.skipped)} ({reasons}); see {output / 'skipped.jsonl'}")


class _progress:  # noqa: N801 - used as a function
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self.bar = Progress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _ratios(text: str) -> dict[str, float]:
    try:
        parts = [float(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts, default=-1) < 0 or sum(parts) <= 0:
        raise DataError("bad split", expected="shares of train, val and test, such as 9,1,0", got=text)
    return dict(zip(("train", "val", "test"), parts, strict=False))


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name or not value:
        raise DataError("bad option", expected="NAME=VALUE", got=text)
    return name, value


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 for an error that is explained, or what typer says for wrong usage."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        app(arguments, prog_name="data")
    except HarnessError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except SystemExit as stop:  # how typer ends, well or with its own message about wrong usage
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
