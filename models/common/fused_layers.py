# SPDX-License-Identifier: Apache-2.0
"""Parts of a layer that run on our own kernels, with the constructors that megatron-core's layer specs call."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from models.common.kernels.norm import residual_norm
from models.common.kernels.qkv import split_and_turn
from models.common.norms import LayerNorm, RMSNorm


class ResidualRMSNorm(RMSNorm):
    """RMS norm before attention or MLP; hands the residual on beside what it puts out."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[s, b, h] -> normalised [s, b, h], and `x`."""
        assert self.eps is not None
        return residual_norm(x, self.weight, None, self.eps)


class ResidualLayerNorm(LayerNorm):
    """Layer norm before attention or MLP; hands the residual on beside what it puts out."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[s, b, h] -> normalised [s, b, h], and `x`."""
        return residual_norm(x, self.weight, self.bias, self.eps)


def residual_norm_of(config: TransformerConfig) -> type[ResidualRMSNorm] | type[ResidualLayerNorm]:
    """The norm a config asks for."""
    return ResidualRMSNorm if config.normalization == "RMSNorm" else ResidualLayerNorm


class FusedSelfAttention(SelfAttention):
    """Self-attention whose queries, keys and values leave the joined projection normalised and turned.

    megatron-core turns queries and keys after it got them, in :meth:`forward`; here that step is left out there and
    taken with the split. No layout has fewer groups than tensor-parallel ranks, where a rank would hold half a group.
    """

    _angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see megatron-core's SelfAttention.

        Args:
            hidden_states: [s, b, h].
            attention_mask: Always None.
            args: As SelfAttention takes them.
            rotary_pos_emb: Angles [s, b, 1, d] float32.
            kwargs: As SelfAttention takes them.

        Returns: [s, b, h], and a bias to be added later or None.
        """
        assert (self.config.num_query_groups or self.config.num_attention_heads) >= self.world_size
        if isinstance(rotary_pos_emb, Tensor):
            self._angles, rotary_pos_emb = rotary_pos_emb, None
        try:
            return super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        finally:
            self._angles = None

    def get_query_key_value_tensors(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """[s, b, h] -> [s, b, n, d], [s, b, g, d], [s, b, g, d]."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        wait_for_weights(self.q_layernorm, self.k_layernorm)
        linear_qkv: Any = self.linear_qkv
        mixed, _ = linear_qkv(hidden_states)
        return split_and_turn(
            mixed,
            self._angles,
            norm_weight(self.q_layernorm),
            norm_weight(self.k_layernorm),
            num_groups=self.num_query_groups_per_partition,
            head_dim=self.hidden_size_per_attention_head,
            eps=self.config.layernorm_epsilon,
        )


def wait_for_weights(*modules: Any) -> None:
    """Do what data parallelism does before a module runs, for modules (or None) whose weights are used without them."""
    for module in modules:
        if module is not None:
            for hook in module._forward_pre_hooks.values():
                hook(module, ())


def is_watched(*modules: Any) -> bool:
    """Whether hooks stand in modules that would not be called."""
    return any(
        module._forward_hooks or module._forward_pre_hooks_with_kwargs or module._backward_hooks
        for module in modules
    )


def norm_weight(norm: Any) -> Tensor | None:
    """Weight of a norm over heads; None where there is none, or an identity in its place."""
    return None if norm is None else norm._parameters.get("weight")
