# SPDX-License-Identifier: Apache-2.0
"""MindSpeed-MM's three files of an FSDP2 training, and the recipe keys they stand for. Torch-free.

Each function adds to the sections of a recipe that is being put together. Every key is translated, listed as without
effect here, or refused: the file's author may have meant something by it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from models.contract.errors import ConfigError

Section = dict[str, Any]
FAMILIES = {"qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl", "qwen2_5_vl": "qwen2_5_vl",
            "qwen3_omni": "qwen3_omni", "qwen3_omni_moe": "qwen3_omni"}  # fmt: skip
"""`model_id` of ``model.json``."""
TOWERS = {
    "vision": ("image_encoder", "vision_encoder"), "projector": ("image_encoder", "vision_projector"),
    "audio": ("audio_encoder", "audio_encoder"), "language": ("text_decoder",),
}  # fmt: skip
"""Where ``model.json`` describes each part of the model."""
TOWER_KEYS = (
    "freeze", "activation_offload",
    # settled by config.json, by the engine or by the device
    "model_id", "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "attn_implementation",
    "attn_layout", "is_causal", "use_npu_fused_moe", "synchronize_per_layer",
)  # fmt: skip
MODEL_KEYS = (
    "model_id", "init_from_hf_path", "image_encoder", "audio_encoder", "text_decoder", "loss_cfg", "patch",
    "attn_implementation", "attn_layout", "is_causal", "use_npu_fused_moe", "activation_offload",
    "synchronize_per_layer",
)  # fmt: skip
LOSS_KEYS = ("compute_mode", "chunk_size", "router_aux_loss_coef")
PATCH_KEYS = ("clip_grad_async", "scale_grad")
MEDIA_KEYS = (
    "image_max_pixels", "image_min_pixels",
    # the tokenizer and the sampling of films and sounds are the checkpoint's
    "model_name_or_path", "use_fast_tokenizer", "split_special_tokens", "use_audio_in_video", "video_max_pixels",
    "video_min_pixels", "video_fps", "video_maxlen", "audio_sampling_rate",
)  # fmt: skip
BASIC_KEYS = (
    "dataset", "cutoff_len", "val_rate", "max_samples",
    # the template is the checkpoint's, and nothing is cached
    "template", "dataset_dir", "cache_dir", "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers",
    "streaming", "preprocess_on_fly",
)  # fmt: skip
NEVER = ("train_on_prompt", "mask_history", "enable_thinking", "tool_format", "use_audio_in_video")
"""Parameters of which only false and null have a counterpart."""
LOADER_KEYS = ("shuffle", "dataloader_mode", "drop_last", "sampler_type", "collate_param", "pin_memory")
SHARDING_KEYS = (
    "sharding_size", "reshard_after_forward", "param_dtype", "reduce_dtype", "offload_to_cpu",
    "num_to_forward_prefetch", "num_to_backward_prefetch", "ignored_modules",
    # one plan for every model: a group a layer, all of them recomputed
    "output_dtype", "cast_forward_inputs", "pin_memory", "align_fsdp_param_groups", "sub_modules_to_wrap",
    "recompute_modules", "use_reentrant",
)  # fmt: skip
DTYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def read_model(file: Path, recipe: Section) -> None:
    """``model.json``: family, checkpoint, what is frozen.

    Raises:
        ConfigError: not such a file, or it holds a key or value without a counterpart.
    """
    found = _object(_json(file), str(file), MODEL_KEYS)
    model_id = found.get("model_id")
    if model_id not in FAMILIES:
        raise ConfigError(
            "unknown model_id", where=str(file), expected=", ".join(FAMILIES), got=repr(model_id)
        )
    model, notes = recipe["model"], recipe["notes"]
    model["family"] = FAMILIES[model_id]
    model["checkpoint"] = _needed(found, "init_from_hf_path", str(file))
    parts = {name: _tower(found, path, str(file)) for name, path in TOWERS.items()}
    model["freeze"] = [name for name, part in parts.items() if _flag(part, "freeze", f"{file}: {name}")]
    notes.append("Layer counts and widths in model.json have no effect there either: config.json decides.")
    if any(_flag(part, "activation_offload", str(file)) for part in (found, *parts.values())):
        notes.append("activation_offload has no counterpart; layers are recomputed.")
    loss = _part(found, "loss_cfg", str(file), LOSS_KEYS)
    _part(found, "patch", str(file), PATCH_KEYS)
    if loss.get("compute_mode", "default") != "default":
        notes.append("loss_cfg.compute_mode computes the same loss in pieces; here it is computed at once.")
    if "router_aux_loss_coef" in loss:
        notes.append("loss_cfg.router_aux_loss_coef has no effect: config.json decides.")


def read_data(file: Path, recipe: Section) -> bool:
    """``data.json``: the dataset, sizes of images, shuffling.

    Returns: whether a part of the dataset is held out for evaluation.

    Raises:
        ConfigError: not such a file, or it holds a key or value without a counterpart.
    """
    found = _object(_json(file), str(file), ("dataset_param", "dataloader_param"))
    where = f"{file}: dataset_param"
    dataset = _part(
        found,
        "dataset_param",
        str(file),
        ("dataset_type", "preprocess_parameters", "basic_parameters", "attr"),
    )
    media = _part(dataset, "preprocess_parameters", where, MEDIA_KEYS)
    basic = _part(dataset, "basic_parameters", where, (*BASIC_KEYS, *NEVER))
    loader = _part(found, "dataloader_param", str(file), LOADER_KEYS)
    section, notes = recipe["data"], recipe["notes"]
    section["dataset"] = _needed(basic, "dataset", f"{where}.basic_parameters")
    for theirs, ours in (("image_min_pixels", "min_pixels"), ("image_max_pixels", "max_pixels")):
        if media.get(theirs) is not None:
            section[ours] = media[theirs]
    if basic.get("cutoff_len") is not None:
        section["seq_length"] = basic["cutoff_len"]
    if loader.get("shuffle") is False:
        section["shuffle_buffer_size"] = 1
    meant = [key for key in NEVER if basic.get(key) or media.get(key)]
    if meant:
        raise ConfigError(
            "no counterpart", where=f"{where}: {', '.join(meant)}",
            expected="false or null: every answer is learnt, as plain text, from the media that the sample names",
        )  # fmt: skip
    notes.append(
        "The dataset is named by its JSON file: prepare it with `qwen-harness data sharegpt`, and name the result."
    )
    if basic.get("max_samples") is not None:
        notes.append(f"max_samples = {basic['max_samples']}: prepare that many of its samples.")
    if basic.get("val_rate"):
        notes.append(f"val_rate = {basic['val_rate']}: prepare it with `--val-fraction {basic['val_rate']}`.")
    return bool(basic.get("val_rate"))


def read_sharding(file: Path, recipe: Section, num_devices: int) -> None:
    """``fsdp2_config.yaml``: number formats, offload; the plan of sharding itself is one for every model.

    Raises:
        ConfigError: not such a file, or it asks for another plan.
    """
    try:
        found = YAML(typ="safe").load(_text(file)) or {}
    except YAMLError as error:
        raise ConfigError("not valid YAML", where=str(file), got=str(error)[:300]) from None
    if not isinstance(found, dict):
        raise ConfigError("not a mapping", where=str(file), got=str(found)[:100])
    _known(found, str(file), SHARDING_KEYS)
    if found.get("sharding_size", "auto") not in ("auto", num_devices):
        raise ConfigError(
            "sharding over a part of the devices has no counterpart", where=f"{file}: sharding_size",
            expected=f"auto, or all {num_devices} devices", got=str(found["sharding_size"]),
            fix="say with --num-processes how many devices the job has",
        )  # fmt: skip
    if found.get("reshard_after_forward", True) is not True:
        raise ConfigError(
            "parameters are always sharded again after the forward pass", where=f"{file}: reshard_after_forward",
            expected="true", got=str(found["reshard_after_forward"]),
        )  # fmt: skip
    only = {"num_to_forward_prefetch": 1, "num_to_backward_prefetch": 1, "ignored_modules": []}
    for key, value in only.items():
        if found.get(key) not in (None, value):
            raise ConfigError(
                "no counterpart", where=f"{file}: {key}", expected=f"{value}, or left out", got=str(found[key])
            )  # fmt: skip
    precision = recipe["precision"]
    precision["dtype"] = _dtype(found.get("param_dtype", "bf16"), f"{file}: param_dtype")
    precision["grad_reduce_in_fp32"] = (
        _dtype(found.get("reduce_dtype", "fp32"), f"{file}: reduce_dtype") == "fp32"
    )
    precision["recompute"] = (
        "full"  # their Qwen models checkpoint every layer, whatever recompute_modules says
    )
    recipe["optimizer"]["cpu_offload_fraction"] = 1.0 if _flag(found, "offload_to_cpu", str(file)) else 0.0
    recipe["notes"].append(
        "Every layer is wrapped and fetched one ahead; norms and routers have no group of their own."
    )


def _tower(found: Section, path: tuple[str, ...], where: str) -> Section:
    """The description of one part of the model; empty where there is none."""
    *outer, last = path
    for key in outer:
        inner = [tower[1] for tower in TOWERS.values() if tower[0] == key and len(tower) > 1]
        found = _part(found, key, where, inner)
    return _part(found, last, where, TOWER_KEYS)


def _part(found: Section, key: str, where: str, known: Iterable[str]) -> Section:
    """A nested object, empty where it is left out."""
    return _object(found.get(key, {}), f"{where}: {key}", known)


def _object(value: Any, where: str, known: Iterable[str]) -> Section:
    if not isinstance(value, dict):
        raise ConfigError("not an object", where=where, got=repr(value)[:100])
    _known(value, where, known)
    return value


def _known(found: Section, where: str, known: Iterable[str]) -> None:
    unknown = sorted(str(key) for key in found.keys() - set(known))
    if unknown:
        raise ConfigError(
            "unknown keys", where=where, expected=", ".join(known), got=", ".join(unknown),
            fix="correct them; what has no effect on this training may be left out",
        )  # fmt: skip


def _flag(found: Section, key: str, where: str) -> bool:
    value = found.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError("not true or false", where=f"{where}: {key}", got=repr(value))
    return value


def _dtype(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in DTYPES:
        raise ConfigError("unknown number format", where=where, expected=", ".join(DTYPES), got=str(value))
    return DTYPES[value]


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ConfigError("not valid JSON", where=str(file), got=str(error)) from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("file not found", where=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the file cannot be read", where=str(file), got=str(error)) from None


def _needed(found: Section, key: str, where: str) -> Any:
    if not found.get(key):
        raise ConfigError("a key is missing", where=where, expected=key)
    return found[key]
