# SPDX-License-Identifier: Apache-2.0
"""Megatron's sharded view of a model, and the one set of options under which checkpoints are written and read.

A checkpoint that conversion wrote, one that training wrote, and a model at any parallel layout agree on keys and
global shapes only if all of them use these options:

- every decoder layer has its own key (`…layers.3.…`), whatever the pipeline layout;
- experts of a layer are one tensor `[num_experts, …]`; fc1 of a gated MLP is one tensor (gate, then up);
- TransformerEngine's `_extra_state` entries are not stored: they hold fp8 scales, which a converted checkpoint
  does not have, and which are computed again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import nn

from models.contract.errors import WeightMappingError

SHARDING_METADATA: dict[str, Any] = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""Pass it (with the optimizer's entries added) as `metadata` to every `sharded_state_dict` call."""


def sharding_metadata(groups: ProcessGroupCollection | None = None) -> dict[str, Any]:
    """Options for `sharded_state_dict`, with the data-parallel group where the caller has one."""
    return dict(SHARDING_METADATA) if groups is None else SHARDING_METADATA | {"dp_cp_group": groups.dp_cp}


def model_state(
    chunks: Sequence[nn.Module], metadata: dict[str, Any] | None = None
) -> dict[str, ShardedStateDict]:
    """Sharded state of a model's chunks: `model`, or `model0`, `model1` … for virtual pipeline stages."""
    states = {}
    for index, chunk in enumerate(unwrap_model(list(chunks))):
        # A copy: megatron-core writes its current process group into the dictionary that it gets.
        state = chunk.sharded_state_dict(metadata=dict(metadata or SHARDING_METADATA))
        kept = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
        states["model" if len(chunks) == 1 else f"model{index}"] = kept
    return states


def sharded_tensors(chunks: Sequence[nn.Module]) -> Iterator[ShardedTensor]:
    """Every piece of a global tensor that this process holds; its data is the parameter's memory.

    Raises:
        WeightMappingError: the model stores something that is not a tensor under a weight's name.
    """
    state = model_state(chunks)
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedBase):
            raise WeightMappingError("the model stores an object among its weights", where=value.key)
