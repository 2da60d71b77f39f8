# SPDX-License-Identifier: Apache-2.0
"""Experts that take the short way around torch's linear layers: interpreted, they run on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from models.common import decoder
from models.common.grouped_experts import with_grouped_products
from models.common.specs import layer_spec
from models.common.token_dispatch import DispatchingMoELayer
from tests.models.common.interpreted import allow_loaded_bounds


class TorchGroupedLinear(torch.nn.Module):
    """TransformerEngine's GroupedLinear as megatron-core wraps it, on one tensor-parallel rank: the same parameters."""

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, split_axis: int, config: TransformerConfig,
        pg_collection: Any, bias: bool, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not bias
        self.num_gemms, self.split_axis, self._pg_collection = num_gemms, split_axis, pg_collection
        for index in range(num_gemms):
            weight: Any = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{index}", weight)

    def forward(self, rows: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        parts = zip(rows.split(tokens_per_expert), range(self.num_gemms), strict=True)
        return torch.cat([part @ getattr(self, f"weight{index}").t() for part, index in parts]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        groups, found = self._pg_collection, {}
        count, first = groups.ep.size() * self.num_gemms, groups.ep.rank() * self.num_gemms
        for index in range(self.num_gemms):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, count))
            state = make_sharded_tensors_for_checkpoint(
                {f"{index}.weight": getattr(self, f"weight{index}")}, "", {f"{index}.weight": self.split_axis}, offsets,
                tp_group=groups.expt_tp, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip
            replace_prefix_for_sharding(state, f"{index}.", prefix)
            [tensor] = state.values()
            tensor.replica_id = (*tensor.replica_id[:2], groups.expt_dp.rank())
            found[f"{prefix}weight{index}"] = tensor
        return found


def experts_of(module: Any) -> list[Any]:
    """All that could take the short way."""
    return [part for part in module.modules() if isinstance(part, TEGroupedMLP)]


def grouped_way_spec(
    config: TransformerConfig, backend: str, *, is_moe: bool = False, is_short: bool = True, **options: Any
) -> ModuleSpec:
    """:func:`models.common.specs.layer_spec` with the experts of a GPU."""
    assert backend == "torch"
    spec: Any = layer_spec(config, "torch", is_moe=is_moe, **options)
    if is_moe:
        linears: Any = GroupedMLPSubmodules(
            linear_fc1=partial(TorchGroupedLinear, split_axis=0),  # type: ignore[arg-type]
            linear_fc2=partial(TorchGroupedLinear, split_axis=1),  # type: ignore[arg-type]
        )
        experts: Any = with_grouped_products(TEGroupedMLP) if is_short else TEGroupedMLP
        spec.submodules.mlp = partial(
            DispatchingMoELayer,
            submodules=MoESubmodules(experts=partial(experts, submodules=linears)),
            moe_token_dispatcher_type=options.get("moe_token_dispatcher_type", "alltoall"),
        )
    return spec


@contextmanager
def grouped_way_everywhere(*, is_short: bool = True) -> Iterator[None]:
    """Decoders that are built meanwhile have experts that take the short way, or those that it stands for."""
    allow_loaded_bounds()
    user: Any = decoder
    user.layer_spec = partial(grouped_way_spec, is_short=is_short)
    try:
        yield
    finally:
        user.layer_spec = layer_spec
