# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's FSDP2 training call (``pretrain_transformers.py``), and the recipe it stands for. Torch-free.

The call takes Megatron's flags and three files: ``--mm-data data.json``, ``--mm-model model.json`` and
``--fsdp2-config-path fsdp2_config.yaml``. Every flag and key is translated, listed here as without effect, or refused:
nothing is dropped in silence.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.contract.compat_fsdp2_files import read_data, read_model, read_sharding
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, parse_recipe

COMMAND = "pretrain_transformers"
VALUES: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "train-iters": ("train", "train_iters", int),
    "micro-batch-size": ("train", "micro_batch_size", int),
    "global-batch-size": ("train", "global_batch_size", int),
    "seed": ("train", "seed", int),
    "seq-length": ("data", "seq_length", int),
    "num-workers": ("data", "num_workers", int),
    "lr": ("optimizer", "lr", float),
    "min-lr": ("optimizer", "min_lr", float),
    "lr-decay-style": ("optimizer", "lr_decay_style", str),
    "lr-warmup-iters": ("optimizer", "lr_warmup_iters", int),
    "lr-decay-iters": ("optimizer", "lr_decay_iters", int),
    "weight-decay": ("optimizer", "weight_decay", float),
    "adam-beta1": ("optimizer", "adam_beta1", float),
    "adam-beta2": ("optimizer", "adam_beta2", float),
    "adam-eps": ("optimizer", "adam_eps", float),
    "clip-grad": ("optimizer", "clip_grad", float),
    "save-interval": ("checkpoint", "save_interval", int),
}
"""Flags with a value and the recipe key of each."""
ONE = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
FILES = ("mm-data", "mm-model", "fsdp2-config-path")
HANDLED = (*FILES, "lr-warmup-fraction", "eval-interval", "eval-iters")
SWITCHES = ("calculate-per-token-loss", "calculate-per-sample-loss", "no-save-optim")
WITHOUT_EFFECT = (
    "use-mcore-models", "context-parallel-algo", "tokenizer-type", "vocab-size", "make-vocab-size-divisible-by",
    "normalization", "use-fused-rmsnorm", "swiglu", "use-fused-swiglu", "no-masked-softmax-fusion",
    "no-gradient-accumulation-fusion", "load", "save", "use-flash-attn", "no-load-optim", "no-load-rng", "no-save-rng",
    "use-torch-fsdp2", "untie-embeddings-and-output-weights", "ckpt-format", "optimizer-selection",
    "use-cpu-initialization", "init-model-with-meta-device", "log-tps", "mm-tool", "log-interval",
    "distributed-backend", "bf16", "use-distributed-optimizer",
)  # fmt: skip
"""Flags whose matter is settled here by the checkpoint's config, by the engine or by the command line."""


def fsdp2_recipe(arguments: Sequence[str], *, num_processes: int | None = None) -> Recipe:
    """The recipe that a call of ``pretrain_transformers.py`` stands for.

    Args:
        arguments: Its flags.
        num_processes: Devices of the job, which torchrun's flags say; default: global batch / micro-batch.

    Raises:
        ConfigError: an unknown flag or key, a value without a counterpart, or a file that is missing or malformed.
    """
    flags = _flags(arguments)
    needed = (*FILES, "train-iters", "global-batch-size", "micro-batch-size", "lr")
    missing = [f"--{name}" for name in needed if name not in flags]
    if missing:
        raise ConfigError("a flag is missing", where=COMMAND, expected=", ".join(missing))
    for name in ONE:
        if flags.get(name, "1") != "1":
            raise ConfigError(
                "FSDP2 shards data-parallel only", where=f"--{name}", expected="1", got=flags[name]
            )
    data: dict[str, Any] = {
        "notes": [], "model": {"attention_backend": "torch"}, "data": {"padding": "longest", "over_length": "truncate"},
        "train": {"engine": "fsdp2"}, "optimizer": {}, "precision": {}, "checkpoint": {},
    }  # fmt: skip
    for name, (section, key, read) in VALUES.items():
        if name in flags:
            data[section][key] = _read(read, flags[name], f"--{name}")
    train = data["train"]
    for name in ("micro-batch-size", "global-batch-size"):
        if train[name.replace("-", "_")] < 1:
            raise ConfigError(
                "not a number of samples", where=f"--{name}", expected="at least 1", got=flags[name]
            )
    _warmup(flags, data)
    train["loss_reduction"] = _reduction(flags, train["micro_batch_size"], data["notes"])
    data["checkpoint"]["save_optimizer"] = "no-save-optim" not in flags
    devices = num_processes or train["global_batch_size"] // train["micro_batch_size"]
    read_model(Path(flags["mm-model"]), data)
    has_held_out = read_data(Path(flags["mm-data"]), data)
    read_sharding(Path(flags["fsdp2-config-path"]), data, devices)
    _evaluation(flags, data, has_held_out=has_held_out)
    data["num_processes"] = devices
    data["hardware"] = ["npu_a3", "npu_a2", "h20", "h100", "h200"]
    data["name"] = f"{data['model']['family']}_{COMMAND}"
    return parse_recipe(data, where=COMMAND)


def _warmup(flags: dict[str, str], data: dict[str, Any]) -> None:
    if "lr-warmup-fraction" not in flags:
        return
    if "lr-warmup-iters" in flags:
        raise ConfigError(
            "--lr-warmup-fraction and --lr-warmup-iters exclude each other", where=COMMAND, fix="name one of them"
        )  # fmt: skip
    fraction = _read(float, flags["lr-warmup-fraction"], "--lr-warmup-fraction")
    data["optimizer"]["lr_warmup_iters"] = round(fraction * data["train"]["train_iters"])


def _evaluation(flags: dict[str, str], data: dict[str, Any], *, has_held_out: bool) -> None:
    """Evaluation of `eval-iters` global batches every `eval-interval` iterations, where a part is held out for it."""
    given = {
        name: _read(int, flags[name], f"--{name}")
        for name in ("eval-interval", "eval-iters")
        if name in flags
    }
    if len(given) == 2 and has_held_out:
        train = data["train"]
        train["eval_interval"] = given["eval-interval"]
        train["eval_samples"] = given["eval-iters"] * train["global_batch_size"]
    elif given:
        data["notes"].append(
            "--eval-interval and --eval-iters do nothing: no held-out part is named (val_rate)."
        )


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """``--name value``, ``--name=value`` and ``--switch`` as a dictionary; a switch has the value ``""``."""
    known = {*VALUES, *ONE, *HANDLED, *SWITCHES, *WITHOUT_EFFECT}
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in known:
            raise ConfigError(
                "unknown flag", where=COMMAND, got=name,
                fix="leave it out, or set the recipe's key for it by hand",
            )  # fmt: skip
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name[2:] in SWITCHES and value:
            raise ConfigError("a switch takes no value", where=name, got=value, fix="leave the value out")
        flags[name[2:]] = value
    return flags


def _reduction(flags: dict[str, str], micro_batch_size: int, notes: list[str]) -> str:
    if "calculate-per-token-loss" in flags:
        return "per_token"
    if "calculate-per-sample-loss" not in flags:
        if micro_batch_size > 1:
            raise ConfigError(
                "the mean over micro-batches has no counterpart: it depends on how the batch is cut", where=COMMAND,
                expected="--calculate-per-token-loss or --calculate-per-sample-loss", got="neither",
                fix="name one of them, or use --micro-batch-size 1",
            )  # fmt: skip
        notes.append("The mean over micro-batches of one sample is the mean over samples.")
    return "per_sample"


def _read(read: Callable[[str], Any], value: str, where: str) -> Any:
    try:
        return read(value)
    except ValueError:
        raise ConfigError("not a number", where=where, got=value) from None
