# SPDX-License-Identifier: Apache-2.0
"""The decoder: the one place that uses megatron-core's GPTModel.

GPTModel is announced to be replaced by HybridModel, which has no mrope in 0.19; when that changes, it changes here.
"""

import logging
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from models.common.rope import MultimodalRope
from models.common.settings import ModelSettings
from models.common.specs import final_norm, layer_spec
from models.common.transformer_configs import is_fused
from models.common.vocabulary import deliver_gradients
from models.contract.architecture import TextArchitecture


class DeepstackLayer(TransformerLayer):
    """A decoder layer that adds vision features to what it puts out.

    The features come in as `context`, megatron-core's slot for a second input: so recompute treats them as an input
    of the layer and their gradient finds its way. A layer without features to add passes them on.
    """

    deepstack_level: int | None = None
    """Which slice of `context` this layer adds; None when it adds none."""

    def forward(
        self, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer, then add `context[deepstack_level]`.

        Args:
            args: As TransformerLayer takes them.
            context: Features that are still to be added, [levels, s, b, h], zero at text positions.
            kwargs: As TransformerLayer takes them.

        Returns: Hidden states [s, b, h] and `context`.
        """
        hidden_states: Any = super().forward(*args, context=None, **kwargs)[0]
        if context is not None and self.deepstack_level is not None:
            hidden_states = hidden_states + context[self.deepstack_level]
        return hidden_states, context


class FusedLossModel(GPTModel):
    """GPTModel with our kernel for the loss."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of every token.

        Args:
            labels: [b, s] int64.
            logits: [s, b, v/tp]; used up.

        Returns: [b, s] float32.
        """
        from models.common.kernels.cross_entropy import token_losses

        return token_losses(logits, labels.transpose(0, 1), self.pg_collection.tp).transpose(0, 1)


def features_travel(config: TransformerConfig, num_deepstack: int) -> bool:
    """Whether deepstack features must be sent on: the first stage has fewer layers than there are levels."""
    if config.pipeline_model_parallel_size == 1:
        return False
    is_virtual = config.virtual_pipeline_model_parallel_size is not None
    return get_num_layers_to_build(config, vp_stage=0 if is_virtual else None, pp_rank=0) < num_deepstack


def build_decoder(
    text: TextArchitecture,
    config: TransformerConfig,
    settings: ModelSettings,
    *,
    num_deepstack: int,
    groups: ProcessGroupCollection,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> GPTModel:
    """Build this stage's part of the decoder.

    Args:
        text: Sizes.
        config: From :func:`models.common.transformer_configs.decoder_config`.
        settings: How to run.
        num_deepstack: Feature levels that the first layers of the whole decoder add.
        groups: Process groups.
        pre_process: This stage holds the embedding.
        post_process: This stage holds the output layer.
        vp_stage: Which virtual stage of this rank, if any.
    """
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(
        logging.ERROR
    )  # the deprecation, once a build
    pp_rank = groups.pp.rank()
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    dense_layers = range(text.num_layers) if text.moe is None else text.moe.dense_layers
    specs = [
        layer_spec(
            config,
            settings.attention_backend,
            is_causal=True,
            is_moe=layer not in dense_layers,
            experts_backend=settings.experts_backend,
            moe_token_dispatcher_type=settings.moe_token_dispatcher_type,
            module=DeepstackLayer if num_deepstack else TransformerLayer,
        )
        for layer in range(offset, offset + count)
    ]
    block: Any = TransformerBlockSubmodules(
        layer_specs=specs, layer_norm=final_norm(config, settings.attention_backend)
    )
    model: Any = (FusedLossModel if is_fused(settings) else GPTModel)(
        config,
        block,
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=text.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_base=int(text.rotary_base),
        scatter_embedding_sequence_parallel=False,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    deliver_gradients(model)
    model.rotary_pos_emb = MultimodalRope(
        text.kv_channels, text.rotary_base, text.mrope_section, interleaved=text.mrope_interleaved
    )
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        if num_deepstack and number < num_deepstack:
            layer.deepstack_level = number - min(offset, num_deepstack)
    return model
