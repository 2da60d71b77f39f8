# SPDX-License-Identifier: Apache-2.0
"""Tokens on their way to experts: on one rank against megatron-core's dispatcher, on two against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from models.common.settings import ModelSettings
from models.common.token_dispatch import DispatchingMoELayer, LocalTokenDispatcher
from models.parity.single import make_pair
from tests.models.common.test_layouts import EP, GATHER, SP, check

pytestmark = pytest.mark.usefixtures("single_process")


def first_layer() -> Any:
    pair = make_pair("qwen3_vl_moe", ModelSettings(moe_aux_loss_coeff=0.0))
    return next(part for part in pair.model.modules() if isinstance(part, DispatchingMoELayer))


def run(layer: Any) -> dict[str, Tensor]:
    """What the layer puts out, and every gradient of the sum of its squares."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(7, 2, layer.config.hidden_size, generator=generator).requires_grad_()
    out, _ = layer(rows)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return gradients | {"out": out.detach(), "rows": rows.grad}


def test_layer_puts_out_the_same_without_another_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = first_layer()
    assert type(layer.token_dispatcher) is LocalTokenDispatcher
    with monkeypatch.context() as patched:
        patched.delattr(token_dispatcher, "sort_chunks_by_idxs")
        found = run(layer)
    layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=get_default_pg_collection(),
    )  # fmt: skip
    expected = run(layer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert value.any(), name


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    "changes", [{"moe_router_padding_for_quantization": True}, {"moe_expert_capacity_factor": 1.0}]
)
def test_layer_whose_rows_are_padded_or_dropped_keeps_the_other_dispatcher(
    changes: dict[str, Any], kind: Any
) -> None:
    """Rows are counted on the device there, and the CPU must wait for the number."""
    layer = first_layer()
    for name, value in changes.items():
        setattr(layer.config, name, value)
    again = DispatchingMoELayer(
        layer.config,
        layer.submodules,
        1,
        pg_collection=get_default_pg_collection(),
        moe_token_dispatcher_type=kind,
    )
    assert type(again.token_dispatcher) is MoEAlltoAllTokenDispatcher


@pytest.mark.slow  # by default trained: tests/models/training/test_layouts.py
def test_tokens_that_all_ranks_gather_get_to_the_same_experts(tmp_path: Path) -> None:
    """Tokens of two data-parallel ranks, which must have equally many, and of two parts of a sequence."""
    split = SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    check("qwen3_vl_moe", {"ep": EP | GATHER, "tp sp ep": split | GATHER}, tmp_path, cases=("image", "image"))
