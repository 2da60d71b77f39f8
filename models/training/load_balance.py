# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss that keeps experts evenly loaded, for routers that are not Megatron's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROUTER = "mlp.gate"
"""End of the name of a transformers router; its forward gives logits [tokens, experts] first."""


class RouterTap:
    """Keeps what the routers of a transformers model put out, layer by layer, until it is taken."""

    def __init__(self, model: nn.Module) -> None:
        self._logits: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith(ROUTER):
                module.register_forward_hook(self._keep)

    def take(self) -> list[Tensor]:
        """Logits of the last forward pass, first layer first."""
        taken, self._logits = self._logits, []
        return taken

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._logits.append(output[0])


def load_balancing_loss(router_logits: Sequence[Tensor], shape: torch.Size, topk: int) -> Tensor:
    """Switch Transformer's load-balancing loss of every layer (arXiv 2101.03961, equation 4), as Megatron counts it.

    ``E * sum_i f_i P_i`` with f_i the share of the routed tokens that go to expert i, and P_i the mean probability of
    expert i; both over all positions of the micro-batch, padding included.

    Args:
        router_logits: Of each layer, [rows * columns, experts]; it may have more rows, or more columns, than the
            micro-batch: what was appended to it does not count.
        shape: Rows and columns of the micro-batch, [b, s].
        topk: Experts of a token.

    Returns: [layers] float32, without the coefficient.
    """
    b, s = shape
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        rows = logits.shape[0] // s if logits.shape[0] % s == 0 else b
        own = logits.view(rows, -1, experts)[:b, :s].reshape(-1, experts).float()
        probabilities = own.softmax(dim=-1)
        chosen = probabilities.topk(topk, dim=-1).indices
        counts = torch.zeros(experts, device=own.device).scatter_add_(
            0, chosen.flatten(), torch.ones(chosen.numel(), device=own.device)
        )
        losses.append(experts * (counts / chosen.numel() * probabilities.mean(dim=0)).sum())
    return torch.stack(losses)
