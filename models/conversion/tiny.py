# SPDX-License-Identifier: Apache-2.0
"""Tiny, complete Hugging Face checkpoint folders: config, weights in shards, tokenizer, template, processors.

What transformers loads by path, and what real checkpoints go through, these go through as well.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from models.common.weight_rules import Shape, hf_tensors
from models.contract.architecture import Architecture, Family
from models.contract.errors import ConfigError
from models.contract.families import detect_family, family_part
from models.contract.tiny_config import tiny_config
from models.conversion.checkpoint_folder import INDEX_FILE
from models.conversion.tiny_omni import untouched_shapes
from models.conversion.tiny_processor import write_processor_files

Init = Literal["training", "random", "coded"]
Fill = Callable[[str, Shape], torch.Tensor]


def write_tiny_checkpoint(
    folder: Path,
    family: Family,
    *,
    seed: int = 0,
    moe: bool = False,
    init: Init = "training",
    dtype: torch.dtype = torch.float32,
    num_shards: int = 2,
    config: dict[str, Any] | None = None,
    has_weights: bool = True,
) -> Path:
    """Write a checkpoint folder in the hub's names and layouts.

    Args:
        folder: Target; must not exist. It appears when everything is written.
        family: Which family.
        seed: Seed of `training` and `random` weights.
        moe: Mixture-of-experts variant of Qwen3-VL.
        init: `training` learns from scratch (biases 0, norms 1). `random` is as well behaved, with biases and norms
            that differ from element to element, for comparing models. `coded` gives every element the value that
            codes its position, for comparing tensors bit by bit; such a model computes nothing useful.
        dtype: Number format of the weights; the config's `torch_dtype` says the same.
        num_shards: Safetensors files.
        config: A changed ``config.json`` to use instead of :func:`tiny_config`.
        has_weights: Without them the folder is small at any size; recipes with ``init = "random"`` need no more.

    Returns: `folder`.

    Raises:
        ConfigError: the folder exists, or the config is not one of the family's.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError("target exists", where=str(folder), fix="remove it, or choose another folder")
    config = tiny_config(family, moe=moe) if config is None else config
    if detect_family(config) != family:
        raise ConfigError("config is of another family", expected=family, got=str(config.get("model_type")))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (partial / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    write_processor_files(partial, family)
    if has_weights:
        architecture = family_part(family, "config").ModelConfig.from_hf(config)
        shapes = checkpoint_shapes(architecture) | untouched_shapes(config)
        write_shards(partial, shapes, filler(init, seed, dtype, architecture.text.num_layers), num_shards)
    partial.rename(folder)
    return folder


def checkpoint_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shape of every mapped tensor by its name on disk, in the hub's layout."""
    rules = family_part(architecture.family, "weights").weight_table(architecture)
    return {name: tensor.shape for name, tensor in hf_tensors(rules).items()}


def filler(init: Init, seed: int, dtype: torch.dtype, num_layers: int) -> Fill:
    """How to make a tensor from its name and shape; every tensor depends on its own name only."""
    if init == "coded":
        return lambda name, shape: coded(name, shape, dtype)

    def fill(name: str, shape: Shape) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.randn(shape, generator=generator)
        return _scaled(name, noise, num_layers, is_plain=init == "training").to(dtype).contiguous()

    return fill


def _scaled(name: str, noise: torch.Tensor, num_layers: int, *, is_plain: bool) -> torch.Tensor:
    kind = name.rsplit(".", 1)[-1]
    if noise.dim() == 1:
        centre = 1.0 if kind == "weight" or kind == "scale" else 0.0
        return torch.full_like(noise, centre) if is_plain else centre + 0.1 * noise
    if "embed" in name.rsplit(".", 2)[-2] or "lm_head" in name:
        return 0.02 * noise
    fan_in = (
        math.prod(noise.shape[1:])
        if "experts.gate_up" not in name and "experts.down" not in name
        else noise.shape[1]
    )
    is_last = name.endswith(
        ("o_proj.weight", "down_proj.weight", "down_proj", "attn.proj.weight", "linear_fc2.weight")
    )
    depth = 2 * num_layers if is_last else 1  # residual branches start small, as in GPT-2
    return noise / math.sqrt(fan_in * depth)


def coded(name: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose bit patterns count up from a number that the name gives; all of them finite.

    The period is a prime, so rows, heads and halves of a tensor differ even where it has more elements than the
    format has numbers (bfloat16: 65,269 values before they repeat).
    """
    bits = {
        torch.bfloat16: (torch.int16, 7, 8),
        torch.float16: (torch.int16, 10, 5),
        torch.float32: (torch.int32, 23, 8),
    }
    integer, mantissa, exponent = bits[dtype]
    finite = ((1 << exponent) - 1) << mantissa  # patterns of one sign below infinity
    period = {torch.bfloat16: 65_269, torch.float16: 63_487, torch.float32: 16_777_213}[dtype]
    count = math.prod(shape)
    code = (torch.arange(count, dtype=torch.int64) + zlib.crc32(name.encode())) % period
    if dtype is torch.float32:
        pattern = code * 127 + (1 << mantissa)  # normal numbers spread over many exponents
        return pattern.to(integer).view(dtype).reshape(shape)
    sign = code >= finite
    pattern = torch.where(sign, code - finite - (1 << 15), code)
    return pattern.to(integer).view(dtype).reshape(shape)


def write_shards(folder: Path, shapes: dict[str, Shape], fill: Fill, num_shards: int) -> None:
    """Write tensors in their order as safetensors shards of about equal size, with the index."""
    total = sum(math.prod(shape) for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    done = 0
    for name, shape in shapes.items():
        shards[min(done * num_shards // total, num_shards - 1)].append(name)
        done += math.prod(shape)
    weight_map, num_bytes = {}, 0
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        tensors = {name: fill(name, shapes[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index_data = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index_data, indent=2) + "\n", encoding="utf-8")
