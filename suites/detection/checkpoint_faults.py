# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as a wrong converter would have written them: HF folders whose tensors were rearranged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors, dict[str, Any]], None]
CHECKPOINT_FAULTS: dict[str, Change] = {}
SEED = 7


def checkpoint_fault(change: Change) -> Change:
    """Enter a change under its function's name."""
    CHECKPOINT_FAULTS[change.__name__] = change
    return change


def write_faulty_checkpoint(source: Path, target: Path, fault: str) -> Path:
    """Copy a HF folder, changing its tensors. Raises ValueError when the change changed nothing."""
    shutil.copytree(source, target)
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    files = sorted(set(index.values()))
    before = {name: safetensors.load_file(source / name) for name in files}
    tensors: Tensors = {key: value.copy() for file in before.values() for key, value in file.items()}
    CHECKPOINT_FAULTS[fault](tensors, {**config, "weight_map": index})
    if all(np.array_equal(tensors[key], value) for file in before.values() for key, value in file.items()):
        raise ValueError(f"{fault} changed nothing in {source}")
    for name in files:
        kept = {key: np.ascontiguousarray(tensors[key]) for key in before[name]}
        safetensors.save_file(kept, target / name, metadata={"format": "pt"})
    return target


@checkpoint_fault
def qkv_interleave(tensors: Tensors, config: dict[str, Any]) -> None:
    text = config["text_config"]
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    for key in _ending(tensors, "self_attn.q_proj.weight"):
        rows = tensors[key].reshape(groups, heads // groups, text["head_dim"], -1)
        tensors[key] = rows.swapaxes(0, 1).reshape(tensors[key].shape)


@checkpoint_fault
def key_value_swap(tensors: Tensors, config: dict[str, Any]) -> None:
    _swap(tensors, "self_attn.k_proj.weight", "self_attn.v_proj.weight")


@checkpoint_fault
def gate_up_swap(tensors: Tensors, config: dict[str, Any]) -> None:
    _swap(tensors, "mlp.gate_proj.weight", "mlp.up_proj.weight")


@checkpoint_fault
def stale_tensor(tensors: Tensors, config: dict[str, Any]) -> None:
    key = _ending(tensors, "layers.1.mlp.down_proj.weight")[0]
    tensors[key] = _initial(tensors[key])


@checkpoint_fault
def stale_shard(tensors: Tensors, config: dict[str, Any]) -> None:
    last = sorted(set(config["weight_map"].values()))[-1]
    for key, file in config["weight_map"].items():
        if file == last and tensors[key].ndim > 1:
            tensors[key] = _initial(tensors[key])


@checkpoint_fault
def norm_lost(tensors: Tensors, config: dict[str, Any]) -> None:
    for suffix in ("q_norm.weight", "k_norm.weight"):
        for key in _ending(tensors, suffix):
            tensors[key] = np.ones_like(tensors[key])


@checkpoint_fault
def embedding_shift(tensors: Tensors, config: dict[str, Any]) -> None:
    for key in _ending(tensors, "embed_tokens.weight"):
        tensors[key] = np.roll(tensors[key], 1, axis=0)


@checkpoint_fault
def vision_qkv_order(tensors: Tensors, config: dict[str, Any]) -> None:
    for suffix in ("attn.qkv.weight", "attn.qkv.bias"):
        for key in _ending(tensors, suffix):
            query, middle, value = np.split(tensors[key], 3)
            tensors[key] = np.concatenate([value, middle, query])


@checkpoint_fault
def patch_channels(tensors: Tensors, config: dict[str, Any]) -> None:
    for key in _ending(tensors, "patch_embed.proj.weight"):
        tensors[key] = tensors[key][:, ::-1]


@checkpoint_fault
def deepstack_mergers(tensors: Tensors, config: dict[str, Any]) -> None:
    for key in [key for key in tensors if "deepstack_merger_list.0." in key]:
        other = key.replace("list.0.", "list.1.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


@checkpoint_fault
def expert_order(tensors: Tensors, config: dict[str, Any]) -> None:
    # The router keeps its numbering: every token meets the wrong experts.
    for key in _ending(tensors, "mlp.gate.weight"):
        tensors[key] = tensors[key][::-1]


def _ending(tensors: Tensors, suffix: str) -> list[str]:
    return [key for key in tensors if key.endswith(suffix)]


def _swap(tensors: Tensors, suffix: str, other: str) -> None:
    for key in _ending(tensors, suffix):
        twin = key.replace(suffix, other)
        tensors[key], tensors[twin] = tensors[twin], tensors[key]


def _initial(tensor: np.ndarray) -> np.ndarray:
    return np.random.default_rng(SEED).normal(0.0, 0.02, tensor.shape).astype(tensor.dtype)
