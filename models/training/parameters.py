# SPDX-License-Identifier: Apache-2.0
"""How many parameters the whole model has, counted once each across the layout, and in which order they lie."""

from hashlib import sha256
from typing import Any

from torch import nn

from models.training.parallel import Ranks

PARTS = ("total", "trainable", "language", "vision", "audio")


def part_of(name: str) -> str:
    """language, vision or audio, from a Megatron parameter name."""
    return "vision" if "vision_model." in name else "audio" if "audio_model." in name else "language"


def count_parameters(modules: list[Any], ranks: Ranks) -> dict[str, int]:
    """Parameters of the whole model by part; every rank calls it.

    A shard counts on its own rank, a replicated tensor on the first rank that holds it.
    """
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for module in modules:
        for name, parameter in module.named_parameters():
            if _counts_here(parameter, ranks):
                counts["total"] += parameter.numel()
                counts[part_of(name)] += parameter.numel()
                counts["trainable"] += parameter.numel() if parameter.requires_grad else 0
    parts = ranks.exchange(counts)
    return {key: sum(part[key] for part in parts) for key in PARTS}


def parameter_order(modules: list[Any], ranks: Ranks) -> str:
    """Digest of the names and shapes of trained parameters, in order, of every rank; every rank calls it.

    The same for any number of data-parallel ranks, which have the same parameters.
    """
    trained = [
        (name, tuple(parameter.shape))
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    digests = set(ranks.exchange(_digest(repr(trained))))
    return _digest(" ".join(sorted(digests)))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _counts_here(parameter: nn.Parameter, ranks: Ranks) -> bool:
    groups = ranks.groups
    assert groups is not None
    is_tensor_shard = getattr(parameter, "tensor_model_parallel", False)
    if not getattr(parameter, "allreduce", True):  # mcore's mark of an expert
        return groups.expt_dp.rank() == 0 and (is_tensor_shard or groups.expt_tp.rank() == 0)
    if getattr(parameter, "shared_embedding", False) and groups.pp.size() > 1 and groups.pp.rank() > 0:
        return False  # the last stage's copy of a tied embedding
    return groups.dp_cp.rank() == 0 and (is_tensor_shard or groups.tp.rank() == 0)
