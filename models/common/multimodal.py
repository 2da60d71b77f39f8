# SPDX-License-Identifier: Apache-2.0
"""A decoder with a vision tower, and perhaps an audio tower: assembly and forward pass, for every family.

    pixels ─▶ vision tower ─▶ tokens ──────────┐ deepstack features
    mel    ─▶ audio tower  ─▶ tokens ──┐       │        │
    ids    ─▶ embedding ───────────────┴─ merge┴─▶ CP slice ─▶ SP slice ─▶ decoder ─▶ loss per token

The towers live on the first pipeline stage. When that stage has fewer decoder layers than there are deepstack
levels, the features that remain travel to the next stages, laid beside the hidden state: [s, b, h * (1 + levels)].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import MegatronModule
from torch import Tensor

from models.common.attention import Segments, make_segments
from models.common.audio import AudioTower
from models.common.batch import IGNORED_LABEL, Batch
from models.common.context_parallel import local_index
from models.common.decoder import build_decoder, features_travel
from models.common.fusion import dense_features, merge_tokens, with_zero_gradients
from models.common.settings import ModelSettings
from models.common.transfer import to_device
from models.common.transformer_configs import decoder_config
from models.common.vision import VisionTower
from models.common.vision_split import see
from models.contract.architecture import Architecture
from models.contract.errors import ShapeError


class MultimodalModel(MegatronModule):
    """One pipeline stage of a model; with one stage, the whole of it.

    Args:
        architecture: Sizes.
        settings: How to run.
        groups: Process groups; None takes megatron-core's current ones.
        pre_process: This stage holds embedding and towers.
        post_process: This stage holds the output layer.
        vp_stage: Which virtual stage of this rank, if any.
    """

    def __init__(
        self,
        architecture: Architecture,
        settings: ModelSettings,
        *,
        groups: ProcessGroupCollection | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        config = decoder_config(architecture.text, settings)
        super().__init__(config=config)
        groups = groups or ProcessGroupCollection.use_mpu_process_groups()
        self.pg_collection = groups
        self.architecture, self.settings = architecture, settings
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = architecture.text.tie_word_embeddings
        levels = len(architecture.vision.deepstack_visual_indexes)
        if features_travel(config, levels):
            config.variable_seq_lengths = True  # what stages exchange has different widths
        if pre_process:
            self.vision_model = VisionTower(architecture.vision, settings, groups)
            self.audio_model = None if architecture.audio is None else AudioTower(architecture.audio, config)
        self.language_model: GPTModel = build_decoder(
            architecture.text,
            config,
            settings,
            num_deepstack=levels,
            groups=groups,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.model_type = self.language_model.model_type
        layers: Any = self.language_model.decoder.layers
        last = layers[-1].layer_number if len(layers) else 0
        self.num_levels_out = 0 if post_process else max(0, levels - last)
        """Deepstack levels that later stages still have to add."""
        self._features: Tensor | None = None
        self.are_gradients_awaited: Callable[[], bool] = lambda: True
        """Whether the backward pass of the micro-batch that comes in must give every parameter a gradient: data
        parallelism waits for it, or ranks that share experts go back together."""
        freeze(self, settings.freeze)

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor] | None) -> None:
        """Take what the stage before sent: [s, b, h], with features beside it when some still travel."""
        tensor: Any = input_tensor[0] if isinstance(input_tensor, list | tuple) else input_tensor
        self._features = None
        hidden = self.config.hidden_size
        if tensor is not None and tensor.shape[-1] > hidden:
            parts = tensor.unflatten(-1, (-1, hidden)).movedim(-2, 0)  # [1 + levels, s, b, h]
            tensor, self._features = parts[0].contiguous(), parts[1:]
        decoder: Any = self.language_model  # megatron-core takes None on the first stage
        decoder.set_input_tensor(tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight of this stage; megatron-core reduces its gradient over the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: Batch) -> Tensor:
        """Run this stage on one micro-batch.

        Args:
            batch: The whole sequences; under context parallelism every rank gets the same and takes its part.

        Returns: On the last stage the loss of every token, [b, s] float32, zero where the label is ignored and where
        another context-parallel rank has the token; or logits [b, s/cp, v/tp] when the batch has no labels. On
        other stages what the next one takes.

        Raises:
            ShapeError: the sequence does not divide over the ranks, or placeholders and media do not match.
        """
        segments, index = self._sequence_layout(batch)
        embeddings = features = None
        if self.pre_process:
            embeddings, features = self._embed(batch, index)
        else:
            features = self._features
        labels = None if batch.labels is None else _pick(batch.labels, index, dim=1)
        out = self.language_model(
            input_ids=None,
            position_ids=_pick(batch.position_ids, index, dim=2),
            attention_mask=None,
            decoder_input=embeddings,
            labels=None if labels is None else labels.clamp(min=0),
            packed_seq_params=segments,
            extra_block_kwargs={"context": features},
        )
        if not self.post_process:
            return self._with_features(out, features)
        if labels is None:
            return out
        losses = out.float().masked_fill(labels == IGNORED_LABEL, 0.0)
        if index is None:
            return losses
        return losses.new_zeros(batch.input_ids.shape).index_copy(1, index, losses)

    def _sequence_layout(self, batch: Batch) -> tuple[Segments | None, Tensor | None]:
        """Segments of a packed row, and the positions this context-parallel rank keeps (None: all)."""
        cp, length = self.settings.context_parallel_size, batch.input_ids.shape[1]
        device = batch.input_ids.device
        lengths: list[int] = [length]
        segments = None
        if batch.cu_seqlens is not None:
            lengths = batch.cu_seqlens.diff().tolist()
            segments = make_segments(lengths, device)
        multiple = self.settings.tensor_model_parallel_size if self.settings.sequence_parallel else 1
        if length % (multiple * cp):
            raise ShapeError(
                "a sequence does not divide over the ranks",
                where="micro-batch",
                expected=f"a length that is a multiple of tp * cp = {multiple * cp}",
                got=f"{length}",
                fix="pad sequences to that multiple",
            )
        if cp == 1:
            return segments, None
        return segments, to_device(local_index(lengths, cp, self.pg_collection.cp.rank()), device)

    def _embed(self, batch: Batch, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings with media in place and deepstack features [levels, s, b, h], both cut for this rank."""
        embeddings = self.language_model.embedding(input_ids=batch.input_ids, position_ids=None)  # [s, b, h]
        embeddings, levels = self._see(embeddings, batch)
        if self.audio_model is not None:
            embeddings = self._hear(embeddings, batch)
        stacked = torch.stack([self._cut(level, index) for level in levels]) if levels else None
        return self._cut(embeddings, index), stacked

    def _see(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Put vision tokens in place; with them the deepstack features of every position, each [s, b, h]."""
        if batch.pixel_values is None or batch.grid_thw is None:
            embeddings = self._without_media(embeddings, self.vision_model)
            # The next stage expects what it always gets; layers of this one add nothing when there is nothing.
            num_levels = len(self.vision_model.deepstack_mergers) if self.num_levels_out else 0
            return embeddings, [embeddings.new_zeros(embeddings.shape) for _ in range(num_levels)]
        assert batch.vision_positions is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision_model)):
            tokens, features = see(
                self.vision_model, batch.pixel_values, batch.grid_thw,
                num_levels=len(self.vision_model.deepstack_mergers), group=self.pg_collection.cp,
            )  # fmt: skip
        embeddings = merge_tokens(embeddings, tokens, batch.vision_positions, kind="vision", batch=batch)
        shape = embeddings.shape
        return embeddings, [dense_features(feature, batch.vision_positions, shape) for feature in features]

    def _hear(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Put audio tokens in place."""
        assert self.audio_model is not None
        if batch.input_features is None or batch.audio_lengths is None:
            return self._without_media(embeddings, self.audio_model)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.audio_model)):
            tokens = self.audio_model(batch.input_features, batch.audio_lengths)
        assert batch.audio_positions is not None
        return merge_tokens(embeddings, tokens, batch.audio_positions, kind="audio", batch=batch)

    def _without_media(self, embeddings: Tensor, tower: torch.nn.Module) -> Tensor:
        """The same embeddings, and no gradient for the tower's parameters, or one of zeros where that is needed."""
        return (
            with_zero_gradients(embeddings, tower.parameters())
            if self.are_gradients_awaited()
            else embeddings
        )

    def _cut(self, hidden: Tensor, index: Tensor | None) -> Tensor:
        """[s, b, h] -> this rank's part, first of the context-parallel, then of the sequence-parallel split."""
        hidden = _pick(hidden, index, dim=0)
        if self.settings.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden.contiguous()

    def _with_features(self, hidden: Tensor, features: Tensor | None) -> Tensor:
        if self.num_levels_out == 0:
            return hidden
        assert features is not None
        return torch.cat([hidden, *features[-self.num_levels_out :]], dim=-1)


def _pick(tensor: Tensor, index: Tensor | None, *, dim: int) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def freeze(model: MultimodalModel, groups: Sequence[str]) -> None:
    """Take parameters out of training by group: language, vision, projector (all mergers), audio."""
    for name, parameter in model.named_parameters():
        if parameter_group(name) in groups:
            parameter.requires_grad = False


def parameter_group(name: str) -> str:
    """Freezing group of a parameter, by its name in the model."""
    if name.startswith(("vision_model.merger.", "vision_model.deepstack_mergers.")):
        return "projector"
    tower = name.partition(".")[0]
    return {"language_model": "language", "vision_model": "vision", "audio_model": "audio"}[tower]
