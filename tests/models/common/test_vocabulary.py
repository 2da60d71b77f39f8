# SPDX-License-Identifier: Apache-2.0
"""Table and output layer that add their gradients themselves, against autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.common.settings import ModelSettings
from models.common.vocabulary import OutputLayer, TokenTable
from models.parity.oracles import TINY
from models.parity.single import make_pair

pytestmark = pytest.mark.usefixtures("single_process")


def ends_of(name: str) -> tuple[Any, list[Any]]:
    """A tiny model, and the weights of its table and output layer: one where they are tied."""
    model = make_pair(name, ModelSettings(moe_aux_loss_coeff=0.0)).model.language_model
    assert type(model.embedding.word_embeddings) is TokenTable
    assert type(model.output_layer) is OutputLayer
    table = model.embedding.word_embeddings.weight
    return model, [table] if model.share_embeddings_and_output_weights else [table, model.output_layer.weight]


def pass_through(model: Any, ids: Tensor) -> None:
    """From the table to the output layer and back, some of whose gradients are zero."""
    states = model.embedding(input_ids=ids, position_ids=None)
    tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits, _ = model.output_layer(states.sin(), weight=tied)
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * factors).sum().backward()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("length", [1, 40, 5000], ids=["one", "", "more-than-ids"])
def test_main_gradients_are_those_of_autograd(name: str, length: int) -> None:
    model, weights = ends_of(name)
    ids = torch.randint(len(weights[0]), (2, length), generator=torch.Generator().manual_seed(2))
    ids[0, length // 2 :] = 7  # as many positions of one id as a picture has
    pass_through(model, ids)
    expected = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
        weight.main_grad = torch.ones_like(weight)
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        pass_through(model, ids)
        for weight in weights:
            assert weight.grad_added_to_main_grad
            assert not getattr(weight, "zero_out_wgrad", False), (
                "data parallelism would add what means nothing"
            )
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.main_grad, 1 + 2 * gradient, rtol=1e-5, atol=1e-4)


def test_frozen_weights_get_nothing() -> None:
    model, weights = ends_of("qwen2_5_vl")
    for weight in weights:
        weight.requires_grad_(False)
        weight.main_grad = torch.ones_like(weight)
    states = model.embedding(input_ids=torch.tensor([[1, 2]]), position_ids=None)
    assert not states.requires_grad
    logits, _ = model.output_layer(states.requires_grad_())
    logits.sum().backward()
    assert states.grad is not None
    assert all(weight.grad is None and bool((weight.main_grad == 1).all()) for weight in weights)
