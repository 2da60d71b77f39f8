# SPDX-License-Identifier: Apache-2.0
"""Ask a checkpoint: captions, answers, held-out evaluation, side-by-side pages.

Exit codes: 0 done, 1 something about the input (one line says what), 2 wrong usage, 130 interrupted.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from models.contract.errors import ConfigError, DataError, HarnessError, RunError
from models.contract.site import load_site
from models.contract.whole_file import write_whole

PROGRAM = os.environ.get("QWEN_HARNESS_PROG", "python -m models.entry.generate")
app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Ask a checkpoint: captions and answers (`answer`, which may be left out), held-out evaluation, side-by-side "
    "pages, public benchmarks. Nothing but those needs a network.",
)  # fmt: skip

Checkpoint = Annotated[
    str,
    typer.Option(
        help="HF folder, Megatron (torch_dist) folder or run directory; a name is looked up in the site"
    ),
]
HfFolder = Annotated[
    Path | None,
    typer.Option(help="config and tokenizer of a Megatron checkpoint that does not bring its own"),
]
Engine = Annotated[
    Literal["auto", "transformers", "megatron"],
    typer.Option(
        help="auto: transformers, a Megatron checkpoint through a temporary HF folder; megatron: our model"
    ),
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: fp32 on a CPU, bf16 on a GPU")
]
SiteFile = Annotated[
    Path | None, typer.Option("--site", help="site file; default $QWEN_HARNESS_SITE, then site.toml")
]
BatchSize = Annotated[int, typer.Option(min=1, help="requests that run together")]
MaxNewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token")]
Seed = Annotated[int, typer.Option(help="with a request's key it decides every draw")]
MinPixels = Annotated[int | None, typer.Option(help="enlarge smaller images; default: the checkpoint's")]
MaxPixels = Annotated[int | None, typer.Option(help="shrink larger images; default: the checkpoint's")]
Files = Annotated[list[Path], typer.Option(help="may be repeated")]


@app.command("answer")
def answer(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str, typer.Option(help="text; <image>, <video>, <audio> say where media go; default: in front")
    ] = ("Describe the image."),
    image: Annotated[list[Path], typer.Option(help="image file; repeat it for several")] = [],  # noqa: B006
    video: Annotated[list[Path], typer.Option(help="video file or folder of frames; may be repeated")] = [],  # noqa: B006
    audio: Annotated[list[Path], typer.Option(help="audio file; may be repeated")] = [],  # noqa: B006
    each: Annotated[
        bool, typer.Option("--each", help="ask about every image on its own, instead of all at once")
    ] = False,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="JSON lines with prompt, images, videos, audios, system; instead of the above"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write the answers as JSON lines")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="sample among so many likeliest tokens; 0: all")] = 0,
    top_p: Annotated[
        float, typer.Option(help="sample among the likeliest tokens of this total probability")
    ] = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    stream: Annotated[
        bool, typer.Option("--stream", help="print tokens as they come, one request at a time")
    ] = False,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    hf_folder: HfFolder = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    site: SiteFile = None,
) -> None:
    """Answer one prompt, or many.

    \b
    Examples:
      answer --checkpoint Qwen3-VL-4B-Instruct --image dog.jpg
      answer --checkpoint runs/lite --image a.png --image b.png --prompt "What changed?"
      answer --checkpoint runs/lite --image a.png --image b.png --each --stream
      answer --checkpoint Qwen3-Omni-30B-A3B-Instruct --audio glass.mp3 --prompt "What is heard?"
      answer --checkpoint FOLDER --requests ask.jsonl --out said.jsonl --temperature 0.7 --seed 3
    """  # noqa: D301 - \b is typer's mark for a block that is not re-wrapped
    from models.generation.request import GenerationOptions, read_requests, request_from_files

    build = partial(request_from_files, prompt, system=system, videos=video, audios=audio)
    if requests is not None:
        asked = list(read_requests(requests))
    else:
        asked = [build(key=str(path), images=[path]) for path in image] if each else [build(images=image)]
    if not asked:
        raise DataError(
            "nothing is asked", where=str(requests or "--each"), expected="at least one request or image"
        )
    options = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    _refuse_existing(out)
    from models.entry.generation_engine import (
        locate,
        open_checkpoint,
    )  # loads torch, after what is cheap to refuse

    source = locate(checkpoint, hf_folder=hf_folder, site=load_site(site), requests=asked)
    lines: list[dict[str, Any]] = []
    with open_checkpoint(
        source, engine=engine, dtype=dtype, min_pixels=min_pixels,
        max_pixels=max_pixels,
    ) as opened:  # fmt: skip
        for batch in batched(asked, 1 if stream else batch_size):
            if stream and len(asked) > 1:
                sys.stdout.write(f"{batch[0].key}: ")
            answers = opened.generate(batch, options, on_token=opened.terminal_writer() if stream else None)
            for request, said in zip(batch, answers, strict=True):
                if stream:
                    sys.stdout.write("\n")
                else:
                    sys.stdout.write((f"{said.key}: " if len(asked) > 1 else "") + said.text + "\n")
                lines.append(
                    {"key": said.key, "prompt": request.turns[-1].content, "answer": said.text,
                     "num_new_tokens": len(said.token_ids), "is_finished": said.is_finished}
                )  # fmt: skip
            sys.stdout.flush()
    if out is not None:
        write_whole(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


@app.command("evaluate")
def evaluate(
    checkpoint: Checkpoint,
    dataset: Annotated[
        str, typer.Option(help="prepared dataset: a folder, or a name that is looked up in the site")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; must not exist")],
    split: Annotated[str, typer.Option(help="which split to ask about")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many samples")] = None,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="control: media keep their shape and lose their content")
    ] = False,
    max_new_tokens: MaxNewTokens = 32,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    hf_folder: HfFolder = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    site: SiteFile = None,
) -> None:
    """Ask every question of a held-out split and score the answers.

    \b
    Examples:
      evaluate --checkpoint tiny-qwen3-vl --dataset scenes --out base.json
      evaluate --checkpoint runs/lite --dataset scenes --out tuned.json
      evaluate --checkpoint runs/lite --dataset scenes --out blank.json --blank-images
    """  # noqa: D301
    from models.contract.evaluation import Evaluation, score_items, write_evaluation
    from models.entry.generation_engine import locate, open_checkpoint
    from models.generation.dataset import iter_samples
    from models.generation.evaluate import evaluate_samples, usable_samples
    from models.generation.request import GenerationOptions

    _refuse_existing(out)
    place = load_site(site)
    folder = place.dataset(dataset)
    options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    samples = iter_samples(folder, split, limit=limit)
    rejected: list[str] = []
    source = locate(checkpoint, hf_folder=hf_folder, site=place)
    with open_checkpoint(
        source, engine=engine, dtype=dtype, min_pixels=min_pixels,
        max_pixels=max_pixels,
    ) as opened:  # fmt: skip
        ask = partial(opened.generate, options=options, blank=blank_images)
        items = tuple(_shown(evaluate_samples(usable_samples(samples, rejected), ask, batch_size=batch_size)))
        if not items:
            raise DataError(
                "no usable sample in the split", where=f"{folder} {split}", got="; ".join(rejected[:3])
            )
        evaluation = Evaluation(
            checkpoint=str(opened.source.weights_folder), checkpoint_fingerprint=opened.fingerprint,
            family=opened.family, engine=opened.engine_name, dataset=str(folder), split=split,
            blank_images=blank_images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            num_rejected=len(rejected), items=items,
        )  # fmt: skip
    write_evaluation(out, evaluation)
    scores = score_items(items)
    parts = [f"{len(items)} items"]
    if scores.accuracy is not None:
        parts.append(
            f"answers right {scores.accuracy:.1%} of {scores.num_answers} (chance {scores.chance_accuracy:.1%})"
        )
    if scores.caption_f1 is not None:
        parts.append(f"caption F1 {scores.caption_f1:.3f} of {scores.num_captions}")
    sys.stdout.write(", ".join(parts) + f" -> {out}\n")


@app.command("page")
def page(
    base: Annotated[Path, typer.Option(help="evaluation before fine-tuning")],
    tuned: Annotated[Path, typer.Option(help="evaluation after it")],
    out: Annotated[Path, typer.Option(help="HTML file to write; must not exist")],
    blank: Annotated[Path | None, typer.Option(help="evaluation after it, with blanked pictures")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="dataset with the pictures; default: the one evaluated")
    ] = None,
    gates: Annotated[Path | None, typer.Option(help="gate results to show, as JSON list")] = None,
    title: Annotated[str, typer.Option(help="heading")] = "Before and after fine-tuning",
    max_rows: Annotated[int, typer.Option(min=1, help="questions shown; scores are over all")] = 200,
    site: SiteFile = None,
) -> None:
    """Write a page with pictures, questions, answers before and after, and the truth.

    \b
    Example:
      page --base base.json --tuned tuned.json --blank blank.json --out look.html
    """  # noqa: D301
    from models.contract.evaluation import read_evaluation
    from models.datasets.sample import Sample
    from models.generation.dataset import iter_samples
    from models.generation.page import render_page

    _refuse_existing(out)
    columns = {"Before": read_evaluation(base), "After": read_evaluation(tuned)}
    if blank is not None:
        columns["After, pictures blanked"] = read_evaluation(blank)
    shown = columns["Before"]
    folder = load_site(site).dataset(dataset or shown.dataset)
    samples = (sample for sample in iter_samples(folder, shown.split) if isinstance(sample, Sample))
    found = json.loads(gates.read_text(encoding="utf-8")) if gates else ()
    write_whole(out, render_page(columns, samples, title=title, max_rows=max_rows, gates=found))
    sys.stdout.write(f"{out}\n")


@app.command("benchmark")
def benchmark(
    checkpoint: Checkpoint,
    task: Annotated[
        list[str],
        typer.Option(help="task, may be repeated; VLMEvalKit: NAME=CLASS of a dataset and its reader"),
    ],
    out: Annotated[Path, typer.Option(help="folder of the results; must not exist")],
    toolkit: Annotated[
        Literal["lmms-eval", "vlmevalkit"], typer.Option(help="which one; it must be installed")
    ] = "lmms-eval",
    batch_size: BatchSize = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the toolkit's command, start nothing")
    ] = False,
    hf_folder: HfFolder = None,
    site: SiteFile = None,
) -> None:
    """Run public benchmarks with lmms-eval or VLMEvalKit; a Megatron checkpoint is exported first.

    \b
    Examples:
      benchmark --checkpoint Qwen3-VL-8B-Instruct --task mmmu_val --task ai2d --out results/8b
      benchmark --checkpoint runs/lite --toolkit vlmevalkit --task MMBench_DEV_EN=ImageMCQDataset --out results/lite
    """  # noqa: D301
    from models.contract.families import load_architecture
    from models.entry.generation_engine import hf_weights, locate
    from models.generation.toolkits import CONFIG_FILE, toolkit_command

    _refuse_existing(out)
    source = locate(checkpoint, hf_folder=hf_folder, site=load_site(site))
    family = load_architecture(source.hf_folder).family
    with nullcontext(source.weights_folder) if dry_run else hf_weights(source) as weights:
        command, config = toolkit_command(
            toolkit, family, weights, name=Path(checkpoint).name, tasks=task, out=out, batch_size=batch_size
        )
        sys.stdout.write(shlex.join(command) + "\n")
        sys.stdout.flush()
        if dry_run:
            return
        out.mkdir()
        if config:
            write_whole(out / CONFIG_FILE, config)
        code = subprocess.run(command, check=False).returncode
    if code:
        raise RunError(
            f"{toolkit} ended with exit code {code}", where=shlex.join(command), fix="see its messages above"
        )


def _shown(items: Any) -> Any:
    """Pass items on with a progress bar, on a terminal only."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description="asking", console=console) if console.is_terminal else items


def _refuse_existing(out: Path | None) -> None:
    if out is not None and out.exists():
        raise ConfigError("output exists", where=str(out), fix="choose another name, or remove it first")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError("output folder not found", where=str(out.parent), fix="create it first")


def one_line(error: HarnessError) -> str:
    """What a terminal shows of an error: everything it knows, on one line."""
    details = [("at", error.where), ("expected", error.expected), ("got", error.got), ("fix", error.fix)]
    text = "; ".join([error.what, *(f"{name}: {value}" for name, value in details if value)])
    return "error: " + " ".join(text.split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; errors that a person can act on become one line, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("megatron", "torch", "transformers", "nv_one_logger", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--") and given[0] != "--help":
        given = ["answer", *given]  # `generate --checkpoint … --image …` asks
    try:
        app(args=given, prog_name=PROGRAM, standalone_mode=True)
    except HarnessError as error:
        sys.stderr.write(one_line(error) + "\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
