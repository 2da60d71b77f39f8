# SPDX-License-Identifier: Apache-2.0
"""Data commands that build a dataset from the formats people have."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from models.contract.errors import DataError
from models.contract.whole_file import write_whole
from models.entry.prepare_options import (
    Output,
    ShardSize,
    ValFraction,
    Verify,
    Workers,
    console,
    progress,
    report,
    write_entries,
)


def synth(
    output: Output,
    train: Annotated[int, typer.Option(min=1, help="Training samples.")] = 2000,
    val: Annotated[
        int, typer.Option(min=0, help="Held-out samples; never a scene of the training set.")
    ] = 128,
    preset: Annotated[
        Literal["scenes", "scenes-audio", "colours", "colours-audio", "fake-vl", "fake-omni"],
        typer.Option(
            help="scenes: shapes to look at. colours: their colours alone. "
            "fake-*: the seeds' demonstrations, one sample many times."
        ),
    ] = "scenes",
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    shard_size: ShardSize = 500,
    workers: Workers = 1,
) -> None:
    """Draw a synthetic dataset of images, short videos and (with -audio) sounds.

    Example: synth -o work/datasets/scenes --train 2000 --val 128
    """
    from models.datasets.prepare.job import write_dataset
    from models.datasets.prepare.synthetic import ConvertScene

    splits = {"train": [("train", i) for i in range(train)], "val": [("val", i) for i in range(val)]}
    splits = {split: entries for split, entries in splits.items() if entries}
    about = {"command": "synth", "preset": preset, "seed": seed, "source": "synthetic"}
    with progress("drawing") as tick:
        summary = write_dataset(
            output, splits, ConvertScene(preset, seed), about=about, shard_size=shard_size, workers=workers,
            on_progress=tick,
        )  # fmt: skip
    report(output, summary)


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
    write_entries(
        output, entries, ConvertLlava(media, layout, verify), about, val_fraction, shard_size, workers,
        dataset=VQA_DATASET if layout == "vqa" else None,
    )  # fmt: skip


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
    write_entries(output, entries, ConvertShareGpt(source, verify), about, val_fraction, shard_size, workers)


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
        write_whole(mllm_json, json.dumps(records, ensure_ascii=False))
        console.print(f"wrote {len(records)} records to {mllm_json}, left out {len(skipped)}")
    if output is not None:
        about = {"command": "llava-instruct", "source": str(annotations), "images": str(images)}
        convert = ConvertLlava(media, "chat", verify, prefix)
        write_entries(output, unique_entries(entries), convert, about, val_fraction, shard_size, workers)


def photos(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, in LLaVA's format.")],
) -> None:
    """Twelve real photographs that come with scikit-image, captioned, as a LLaVA-format folder.

    Example: photos -o work/raw/photos, then llava-pretrain work/raw/photos -o work/datasets/photos --val-fraction 0.1
    """
    from models.datasets.prepare.photos import write_photos

    console.print(f"wrote {write_photos(output)} entries to {output}")
