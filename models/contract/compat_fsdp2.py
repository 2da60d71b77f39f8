# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's FSDP2 training call (``pretrain_transformers.py``), and the recipe it stands for. Torch-free.

The call takes Megatron's flags and three files: ``--mm-data data.json``, ``--mm-model model.json`` and
``--fsdp2-config-path fsdp2_config.yaml``. Every flag and key is translated, listed here as without effect, or refused:
nothing is dropped in silence.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, parse_recipe

COMMAND = "pretrain_transformers"
FAMILIES = {"qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl", "qwen2_5_vl": "qwen2_5_vl",
            "qwen3_omni": "qwen3_omni", "qwen3_omni_moe": "qwen3_omni"}  # fmt: skip
"""`model_id` of ``model.json``."""
VALUES: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "train-iters": ("train", "train_iters", int),
    "micro-batch-size": ("train", "micro_batch_size", int),
    "global-batch-size": ("train", "global_batch_size", int),
    "seed": ("train", "seed", int),
    "eval-interval": ("train", "eval_interval", int),
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
HANDLED = ("mm-data", "mm-model", "fsdp2-config-path", "lr-warmup-fraction", "eval-iters")
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
FSDP2_KEYS = (
    "sharding_size", "reshard_after_forward", "param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs",
    "num_to_forward_prefetch", "num_to_backward_prefetch", "offload_to_cpu", "pin_memory", "align_fsdp_param_groups",
    "sub_modules_to_wrap", "ignored_modules", "recompute_modules", "use_reentrant",
)  # fmt: skip
DTYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def fsdp2_recipe(arguments: Sequence[str], *, num_processes: int | None = None) -> Recipe:
    """The recipe that a call of ``pretrain_transformers.py`` stands for.

    Args:
        arguments: Its flags.
        num_processes: Devices of the job, which torchrun's flags say; default: global batch / micro-batch.

    Raises:
        ConfigError: an unknown flag or key, a value without a counterpart, or a file that is missing or malformed.
    """
    flags = _flags(arguments)
    for name in ("mm-data", "mm-model", "fsdp2-config-path", "global-batch-size", "micro-batch-size", "lr"):
        if name not in flags:
            raise ConfigError("a flag is missing", where=COMMAND, expected=f"--{name}")
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
    if "lr-warmup-fraction" in flags:
        fraction = _read(float, flags["lr-warmup-fraction"], "--lr-warmup-fraction")
        data["optimizer"]["lr_warmup_iters"] = round(fraction * train["train_iters"])
    train["loss_reduction"] = _reduction(flags, train["micro_batch_size"], data["notes"])
    data["checkpoint"]["save_optimizer"] = "no-save-optim" not in flags
    _model(Path(flags["mm-model"]), data)
    _data(Path(flags["mm-data"]), data)
    _sharding(Path(flags["fsdp2-config-path"]), data, num_processes)
    data["num_processes"] = num_processes or train["global_batch_size"] // train["micro_batch_size"]
    data["hardware"] = ["npu_a3", "npu_a2", "h20", "h100", "h200"]
    data["name"] = f"{data['model']['family']}_{COMMAND}"
    return parse_recipe(data, where=COMMAND)


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


def _model(file: Path, data: dict[str, Any]) -> None:
    found = _json(file)
    model_id = found.get("model_id")
    if model_id not in FAMILIES:
        raise ConfigError(
            "unknown model_id", where=str(file), expected=", ".join(FAMILIES), got=repr(model_id)
        )
    model, notes = data["model"], data["notes"]
    model["family"] = FAMILIES[model_id]
    model["checkpoint"] = _needed(found, "init_from_hf_path", file)
    encoder = found.get("image_encoder", {})
    parts = {
        "vision": encoder.get("vision_encoder", {}), "projector": encoder.get("vision_projector", {}),
        "language": found.get("text_decoder", {}),
    }  # fmt: skip
    model["freeze"] = [name for name, part in parts.items() if part.get("freeze")]
    notes.append("Layer counts and widths in model.json have no effect there either: config.json decides.")
    if any(part.get("activation_offload") for part in (found, *parts.values())):
        notes.append("activation_offload has no counterpart; layers are recomputed.")
    if found.get("loss_cfg", {}).get("compute_mode", "default") != "default":
        notes.append("loss_cfg.compute_mode computes the same loss in pieces; here it is computed at once.")


def _data(file: Path, data: dict[str, Any]) -> None:
    found = _json(file).get("dataset_param", {})
    media, basic = found.get("preprocess_parameters", {}), found.get("basic_parameters", {})
    section = data["data"]
    section["dataset"] = _needed(basic, "dataset", file)
    for theirs, ours in (("image_min_pixels", "min_pixels"), ("image_max_pixels", "max_pixels")):
        if media.get(theirs) is not None:
            section[ours] = media[theirs]
    if basic.get("cutoff_len") is not None:
        section["seq_length"] = basic["cutoff_len"]
    loader = _json(file).get("dataloader_param", {})
    if loader.get("shuffle") is False:
        section["shuffle_buffer_size"] = 1
    if basic.get("train_on_prompt") or basic.get("mask_history"):
        raise ConfigError(
            "no counterpart",
            where=f"{file}: train_on_prompt or mask_history",
            expected="false: every answer is learnt",
        )
    data["notes"].append(
        "The dataset is named by its JSON file: prepare it with `qwen-harness data sharegpt`, and name the result."
    )


def _sharding(file: Path, data: dict[str, Any], num_processes: int | None) -> None:
    try:
        found = YAML(typ="safe").load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError("file not found", where=str(file)) from None
    except YAMLError as error:
        raise ConfigError("not valid YAML", where=str(file), got=str(error)[:300]) from None
    unknown = sorted(found.keys() - set(FSDP2_KEYS))
    if unknown:
        raise ConfigError(
            "unknown keys", where=str(file), expected=", ".join(FSDP2_KEYS), got=", ".join(unknown)
        )
    if found.get("sharding_size", "auto") not in ("auto", num_processes):
        raise ConfigError(
            "sharding over a part of the devices has no counterpart", where=f"{file}: sharding_size",
            expected="auto, or all devices", got=str(found["sharding_size"]),
        )  # fmt: skip
    if found.get("reshard_after_forward", True) is not True:
        raise ConfigError(
            "parameters are always sharded again after the forward pass", where=f"{file}: reshard_after_forward",
            expected="true", got=str(found["reshard_after_forward"]),
        )  # fmt: skip
    precision = data["precision"]
    precision["dtype"] = _dtype(found.get("param_dtype", "bf16"), f"{file}: param_dtype")
    precision["grad_reduce_in_fp32"] = (
        _dtype(found.get("reduce_dtype", "fp32"), f"{file}: reduce_dtype") == "fp32"
    )
    precision["recompute"] = (
        "full"  # their Qwen models checkpoint every layer, whatever recompute_modules says
    )
    data["optimizer"]["cpu_offload_fraction"] = 1.0 if found.get("offload_to_cpu") else 0.0
    data["notes"].append(
        "Every layer is wrapped and fetched one ahead; norms and routers have no group of their own."
    )


def _dtype(value: str, where: str) -> str:
    if value not in DTYPES:
        raise ConfigError("unknown number format", where=where, expected=", ".join(DTYPES), got=str(value))
    return DTYPES[value]


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("file not found", where=str(file)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("not valid JSON", where=str(file), got=str(error)) from None


def _needed(found: dict[str, Any], key: str, file: Path) -> Any:
    if not found.get(key):
        raise ConfigError("a key is missing", where=str(file), expected=key)
    return found[key]


def _read(read: Callable[[str], Any], value: str, where: str) -> Any:
    try:
        return read(value)
    except ValueError:
        raise ConfigError("not a number", where=where, got=value) from None
