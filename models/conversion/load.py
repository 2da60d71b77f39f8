# SPDX-License-Identifier: Apache-2.0
"""Load a Hugging Face checkpoint straight into a Megatron model, whatever part of it this process holds."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import distributed, nn

from models.common.weight_rules import ExpertLayout, WeightRule
from models.contract.errors import WeightMappingError
from models.conversion.regions import Box, ReadRows, read_box
from models.conversion.source import check_copies, open_source
from models.conversion.torch_dist import sharded_tensors

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_hf_weights(
    model: nn.Module | Sequence[nn.Module],
    folder: Path,
    *,
    num_layers: int | None = None,
    experts: ExpertLayout | None = None,
) -> None:
    """Fill every parameter of `model` from the checkpoint in `folder`, reading only what this process needs.

    Values are converted to each parameter's dtype. Call it before the optimizer is built, or let the optimizer copy
    its main parameters again. With several processes every one of them must call it.

    Args:
        model: A Megatron model, or its chunks on this rank; wrapped (DDP, Float16Module) or not.
        folder: HF checkpoint folder.
        num_layers: Decoder layers of a model that keeps only the first so many; None takes the model to be whole.
        experts: Layout of fused experts; needed only where shapes cannot tell.

    Raises:
        ConfigError: config.json is missing, broken or of an unknown architecture.
        WeightMappingError: the files are broken, or checkpoint, table and model do not fit, in either direction.
    """
    source = open_source(Path(folder), experts=experts)
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    rules = {rule.key: rule for rule in source.rules if not _is_cut(rule, num_layers)}
    with source.checkpoint as checkpoint:
        check_copies(source)
        loaded: set[str] = set()
        unknown: set[str] = set()
        for shard in sharded_tensors(chunks):
            if shard.key in rules:
                _fill(rules[shard.key], shard, checkpoint.read)
                loaded.add(shard.key)
            else:
                unknown.add(shard.key)
        checkpoint.check_unchanged()
    _check_complete(rules, loaded, unknown)
    logger.info("loaded %d tensors from %s (%s)", len(loaded), folder, source.layout)


def _fill(rule: WeightRule, shard: ShardedTensor, read: ReadRows) -> None:
    whole = (rule.shape[0] if not rule.pads_rows else shard.global_shape[0], *rule.shape[1:])
    if tuple(shard.global_shape) != whole or shard.global_shape[0] < rule.shape[0]:
        raise WeightMappingError(
            "the model's tensor has another shape than the checkpoint's", where=rule.key,
            expected=str(rule.shape), got=str(tuple(shard.global_shape)),
            fix="build the model from this checkpoint's config.json",
        )  # fmt: skip
    box = Box(tuple(shard.global_offset), (1,) * shard.prepend_axis_num + tuple(shard.local_shape))
    data = shard.data
    assert data is not None
    value = torch.empty(box.size, dtype=data.dtype)
    read_box(rule, box, read, value)
    data.copy_(value.reshape(data.shape))


def _is_cut(rule: WeightRule, num_layers: int | None) -> bool:
    """Whether a model that keeps only the first decoder layers lacks this tensor."""
    prefix = "language_model.decoder.layers."
    if num_layers is None or not rule.key.startswith(prefix):
        return False
    return int(rule.key.removeprefix(prefix).partition(".")[0]) >= num_layers


def _check_complete(rules: dict[str, WeightRule], loaded: set[str], unknown: set[str]) -> None:
    """Every rule must be loaded by some rank, and every tensor of the model must have a rule."""
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    everywhere: list[tuple[set[str], set[str]]] = [(loaded, unknown)]
    if several:
        everywhere = [(set(), set())] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, (loaded, unknown))
    missing = sorted(rules.keys() - set[str]().union(*(keys for keys, _ in everywhere)))
    extra = sorted(set[str]().union(*(keys for _, keys in everywhere)))
    if missing or extra:
        raise WeightMappingError(
            "the model and the checkpoint's table do not fit",
            where="Megatron tensors",
            expected=f"exactly the {len(rules)} tensors of the table",
            got=f"{len(missing)} the model lacks: {', '.join(missing[:5]) or 'none'}; "
            f"{len(extra)} without a rule: {', '.join(extra[:5]) or 'none'}",
            fix="build the model from this checkpoint's config.json; for a model cut to its first layers say so",
        )
