# SPDX-License-Identifier: Apache-2.0
"""Norms for the torch backend that, unlike megatron-core's, take sequence parallelism and run in any dtype.

The caller of a layer spec is megatron-core: constructors have its keywords.
"""

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm, [..., hidden_size] -> the same. Statistics are taken in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums these gradients over the tensor-parallel ranks, each of which saw a part.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """Layer norm with bias, [..., hidden_size] -> the same. Statistics are taken in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_of(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The norm a config asks for."""
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm
