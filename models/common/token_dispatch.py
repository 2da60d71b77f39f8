# SPDX-License-Identifier: Apache-2.0
"""How tokens get to their experts and back, where megatron-core's ways move more than they need to."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, permute
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from torch import Tensor

from models.common.settings import TokenDispatcherType
from models.common.transfer import begin_to_host


class DispatchingMoELayer(MoELayer):
    """megatron-core's layer with a dispatcher that suits the number of ranks that share its experts."""

    def __init__(
        self,
        config: Any,
        *args: Any,
        moe_token_dispatcher_type: TokenDispatcherType = "alltoall",
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, *args, pg_collection=groups, **kwargs)
        kind: type[Any] | None = None
        if config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization:
            if groups.tp_ep.size() == 1:
                kind = LocalTokenDispatcher
            elif moe_token_dispatcher_type == "allgather":
                kind = GatheringTokenDispatcher
        if kind is not None:
            self.token_dispatcher = kind(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups
            )


class LocalTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """For a rank that has all experts: rows are in their order once the first permutation is done.

    megatron-core's would put them in that order once more, forward and back, and wait for the device to say how many
    rows each expert has: experts that need to know on the CPU ask for it themselves.
    """

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        return tokens_per_expert

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Any, Tensor]:
        """Rows [t, h], how many each expert has [e], and their weights [t]."""
        tokens_per_expert, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Rows of the experts [t, h], as they are."""
        return hidden_states


class GatheringTokenDispatcher(MoEAllGatherTokenDispatcher):
    """Every rank gets the tokens of all, takes those of its experts, and gives back a sum for each token.

    A token goes to every rank once, not once for each of its experts there: with n ranks and k experts a token that is
    n - 1 rows instead of k (n - 1) / n, less wherever n < k, and nobody needs to know who sends how many. All ranks
    must have equally many tokens.

    megatron-core's own waits twice for the device, after it has gathered everything, sums in fp32, which is twice as
    much to send, and sorts weights in a pass of its own.
    """

    tp_ep_group: Any
    routing_map: Any
    local_expert_indices: list[int]
    _tokens_per_expert: Any

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Gather tokens [t, h] and their weights [t, all experts] -> [n t, h] and [n t, e] of this rank's experts."""
        group, own = self.tp_ep_group, slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        with torch.no_grad():
            chosen = gather_from_sequence_parallel_region(self.routing_map.to(torch.uint8), group=group)
            self.local_map = chosen[:, own].bool().contiguous()
            self._tokens_per_expert = self.local_map.sum(dim=0)
            # The number comes while the tokens themselves are on their way.
            self._num_rows = begin_to_host(self._tokens_per_expert.sum())
        probs = gather_from_sequence_parallel_region(probs, group=group)[:, own].contiguous()
        return gather_from_sequence_parallel_region(hidden_states, group=group), probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of this rank's experts, one expert's behind another's [r, h], how many each has [e], and weights [r]."""
        self.hidden_shape_before_permute = hidden_states.shape
        rows, row_weights, self.reversed_local_input_permutation_mapping, _, _ = permute(
            hidden_states,
            self.local_map,
            probs=probs,
            num_out_tokens=int(self._num_rows()),
            fused=self.config.moe_permute_fusion,
        )
        assert row_weights is not None
        tokens_per_expert, self.routing_map, self._tokens_per_expert = self._tokens_per_expert, None, None
        return rows, tokens_per_expert, row_weights

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sums of this rank's experts for all tokens [n t, h] -> sums of all experts for this rank's tokens [t, h]."""
        return reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.tp_ep_group)
