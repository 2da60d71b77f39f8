# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts that leaves tokens where they are if all experts of a layer are on this rank."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class LocalMoELayer(MoELayer):
    """megatron-core's layer, with :class:`LocalTokenDispatcher` where nobody else has experts of it."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, *args, pg_collection=groups, **kwargs)
        has_fixed_size = (
            config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization
        )
        if has_fixed_size and groups.tp_ep.size() == 1:
            self.token_dispatcher = LocalTokenDispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups
            )


class LocalTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Rows are in the order of their experts once the first permutation is done.

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
