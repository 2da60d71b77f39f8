# SPDX-License-Identifier: Apache-2.0
"""A decoder's table of tokens and its output layer, whose gradients go straight to where Megatron sums them.

By way of autograd each micro-batch writes a gradient of all the vocabulary's rows in the model's format, for the table
most of it zeros, which data parallelism then adds in one more pass: 4 ms of the 690 that a row of 8,192 tokens takes
Qwen2.5-VL-7B on an H200.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from models.common.kernels.products import table_gradient, weight_gradient


class TokenTable(VocabParallelEmbedding):
    """The embedding; tensor-parallel ranks have a part of the vocabulary each."""

    def forward(self, input_: Tensor) -> Tensor:
        """[b, s] int64 -> [b, s, h]."""
        group: Any = self.tp_group
        if group.size() == 1:
            return cast(Tensor, _Lookup.apply(input_, self.weight))
        is_here = (input_ >= self.vocab_start_index) & (input_ < self.vocab_end_index)
        ids = (input_ - self.vocab_start_index).masked_fill(~is_here, 0)
        found = cast(Tensor, _Lookup.apply(ids, self.weight)) * is_here[..., None]
        return reduce_from_tensor_model_parallel_region(found, group=group)


class OutputLayer(ColumnParallelLinear):
    """The output layer; tensor-parallel ranks have a part of the vocabulary each."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif self.allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return cast(Tensor, _Project.apply(input, weight))


def deliver_gradients(model: GPTModel) -> None:
    """Have table and output layer of a model add their gradients themselves.

    megatron-core's model makes both itself and takes no classes for them.
    """
    if model.pre_process:
        _become(model.embedding.word_embeddings, TokenTable, of=VocabParallelEmbedding)
    if model.post_process:
        _become(model.output_layer, OutputLayer, of=ColumnParallelLinear)
    if model.pre_process and model.post_process and model.share_embeddings_and_output_weights:
        # What autograd brings of a tied weight is to be added where one of the two does not add its part itself.
        cast(Any, model.shared_embedding_or_output_weight()).zero_out_wgrad = False


def _become(module: torch.nn.Module, kind: type[torch.nn.Module], *, of: type[torch.nn.Module]) -> None:
    assert type(module) is of, f"{type(module).__name__} is not what megatron-core made so far"
    module.__class__ = kind


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor | None]:
        [ids] = ctx.saved_tensors
        return None, table_gradient(ctx.weight, ids.flatten(), grad_outputs[0].flatten(0, -2))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        ctx.weight = weight
        return states @ weight.t()  # no view: the loss writes over it

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        [states] = ctx.saved_tensors
        d_out = grad_outputs[0].flatten(0, -2)
        d_states = (d_out @ ctx.weight).view(states.shape)
        return d_states, weight_gradient(ctx.weight, d_out, states.flatten(0, -2))
