# SPDX-License-Identifier: Apache-2.0
"""`qwen-harness compat …`: other projects' commands by their own arguments. A conversion prints the native command it
stands for, then runs it; a training script prints the recipe it stands for.
"""

import shlex
from collections.abc import Callable
from typing import Annotated

import typer

from harness.cli.handover import hand_over
from models.contract.compat_convert import mm_convert, run_8xh20
from models.contract.compat_fsdp2 import fsdp2_recipe
from models.contract.compat_train import WITHOUT_ARGUMENTS, recipe_toml, script_recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Other projects' commands by their own arguments: conversions print the native command that they stand for "
    "and run it, training scripts print the recipe that they stand for.",
)
AS_GIVEN = {"ignore_unknown_options": True}
"""The other command's flags are its own: they reach its parser as they were typed."""
Arguments = Annotated[list[str] | None, typer.Argument(metavar="ARGUMENT...", show_default=False)]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Devices of the job, which the script takes from its machine (default: the fewest whole nodes of eight).",
    ),
]
PrintOnly = Annotated[bool, typer.Option("--print", help="Print the native command and stop.")]


@app.command("run_8xH20", context_settings=AS_GIVEN)
def run_8xh20_verb(arguments: Arguments = None, print_only: PrintOnly = False) -> None:
    """`run_8xH20.sh`: MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR [HF_DIR].

    MG2HF `false` converts Hugging Face to Megatron, `true` Megatron to Hugging Face with the names and files of HF_DIR.
    PR (fp32, bf16, fp16) counts here. MODEL_SIZE and USE_CUDA are not needed: sizes come from config.json, nothing is
    computed on a GPU, and the result loads at any TP/PP/EP layout.

    Example: `qwen-harness compat run_8xH20 A3B Qwen3-VL-30B-A3B Qwen3-VL-30B-A3B-mcore false true bf16`

    Example: `qwen-harness compat run_8xH20 A3B save/ out/ true true bf16 Qwen3-VL-30B-A3B`
    """
    _stand_for(["convert", *run_8xh20(arguments or [])], print_only=print_only)


@app.command("mm-convert", context_settings=AS_GIVEN)
def mm_convert_verb(arguments: Arguments = None, print_only: PrintOnly = False) -> None:
    """MindSpeed-MM's `mm-convert`: CONVERTER METHOD --FLAG VALUE …

    Converters: Qwen3VLConverter, GenericDCPConverter, ExpertMergeDcpConverter, each with hf_to_dcp or dcp_to_hf.

    Example: `qwen-harness compat mm-convert Qwen3VLConverter hf_to_dcp --hf_dir Qwen3-VL-8B --dcp_dir Qwen3-VL-8B-dcp`

    Example: `qwen-harness compat mm-convert Qwen3VLConverter dcp_to_hf --load_dir save --save_dir out
    --model_assets_dir Qwen3-VL-8B`
    """
    _stand_for(["convert", *mm_convert(arguments or [])], print_only=print_only)


@app.command("run_mcore_qwen", context_settings=AS_GIVEN)
def run_mcore_qwen(arguments: Arguments = None, num_processes: NumProcesses = None) -> None:
    """`run_mcore_qwen.sh`: 24 arguments for Qwen2.5-VL, 26 for Qwen3-VL. Prints the recipe they stand for.

    ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP [ETP EP] SP DO FL AC
    OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS
    LR_WARMUP_ITERS OUTPUT_BASEPATH

    What has no effect in the script has none here, and what the script gets wrong takes the checkpoint's value: the
    recipe's notes say which.

    Example: `qwen-harness compat run_mcore_qwen dsw 7B 1 64 1e-5 1e-6 8192 8192 bf16 1 1 1 true true false false false
    100000 wds wds Qwen2.5-VL-7B-Instruct 500 100 out > recipe.toml`, then `qwen-harness plan recipe.toml --hw h200`
    """
    _print_recipe("run_mcore_qwen", arguments, num_processes)


def _script_without_arguments(script: str) -> Callable[..., None]:
    def verb(arguments: Arguments = None) -> None:
        _print_recipe(script, arguments, None)

    verb.__doc__ = f"""`{script}.sh`, which takes no arguments. Prints the recipe it stands for.

    Example: `qwen-harness compat {script} > recipe.toml`, then `qwen-harness plan recipe.toml --hw h200`
    """
    return verb


for _script in WITHOUT_ARGUMENTS:
    app.command(_script)(_script_without_arguments(_script))


@app.command("pretrain_transformers", context_settings=AS_GIVEN)
def pretrain_transformers(arguments: Arguments = None, num_processes: NumProcesses = None) -> None:
    """MindSpeed-MM's `pretrain_transformers.py` with `--use-torch-fsdp2`. Prints the recipe that the flags stand for.

    Reads the three files that it is given: `--mm-data data.json`, `--mm-model model.json` and `--fsdp2-config-path
    fsdp2_config.yaml`. What has no counterpart is refused by name.

    Example: `qwen-harness compat pretrain_transformers --mm-data data_30B.json --mm-model model_30B.json
    --fsdp2-config-path fsdp2_config.yaml --micro-batch-size 1 --global-batch-size 8 --seq-length 1024 --lr 1e-5
    --train-iters 10000 --lr-warmup-fraction 0.1 --calculate-per-token-loss > recipe.toml`
    """
    typer.echo(recipe_toml(fsdp2_recipe(arguments or [], num_processes=num_processes)), nl=False)


def _print_recipe(script: str, arguments: list[str] | None, num_processes: int | None) -> None:
    recipe = script_recipe(script, arguments or [], num_processes=num_processes)
    typer.echo(recipe_toml(recipe), nl=False)


def _stand_for(native: list[str], *, print_only: bool) -> None:
    """Print a native command; run it unless told not to."""
    typer.echo(shlex.join(["qwen-harness", *native]))
    if not print_only:
        raise typer.Exit(hand_over(native[0], native[1:]))
