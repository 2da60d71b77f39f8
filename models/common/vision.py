# SPDX-License-Identifier: Apache-2.0
"""The vision tower on megatron-core layers: Qwen2.5-VL's windows, Qwen3's position table and deepstack.

Tensor parallel like the decoder, without sequence parallelism: its activations are whole on every rank.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from models.common.attention import Segments, make_segments
from models.common.norms import norm_of
from models.common.rope import vision_rope
from models.common.settings import ModelSettings
from models.common.specs import layer_spec
from models.common.transfer import to_device
from models.common.transformer_configs import vision_config
from models.common.vision_layout import VisionLayout, vision_layout
from models.contract.architecture import VisionArchitecture


class PatchMerger(MegatronModule):
    """Turns m*m neighbouring patches into one token of the decoder's width.

    Args:
        config: The tower's config.
        vision: The tower's sizes.
        groups: Process groups.
        norm_after_shuffle: Deepstack mergers normalise the joined patches, the main merger each patch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionArchitecture,
        groups: ProcessGroupCollection,
        *,
        norm_after_shuffle: bool,
    ) -> None:
        super().__init__(config=config)
        self.width = vision.hidden_size * vision.spatial_merge_size**2
        self.norm_after_shuffle = norm_after_shuffle
        normed = self.width if norm_after_shuffle else vision.hidden_size
        self.norm = norm_of(config)(config=config, hidden_size=normed, eps=vision.layernorm_epsilon)
        linear = {"config": config, "init_method": config.init_method, "bias": True, "tp_group": groups.tp}
        self.linear_fc1 = ColumnParallelLinear(self.width, self.width, gather_output=False, **linear)
        self.linear_fc2 = RowParallelLinear(
            self.width, vision.out_hidden_size, input_is_parallel=True, skip_bias_add=False, **linear
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[p, h_vision] -> [m, h]."""
        if self.norm_after_shuffle:
            joined = self.norm(hidden_states.reshape(-1, self.width))
        else:
            joined = self.norm(hidden_states).reshape(-1, self.width)
        inner, _ = self.linear_fc1(joined)
        out, _ = self.linear_fc2(F.gelu(inner))
        return out


class VisionTower(MegatronModule):
    """Patches to decoder tokens.

    Args:
        vision: Sizes.
        settings: How to run.
        groups: Process groups; only the tensor-parallel one is used.
    """

    def __init__(
        self, vision: VisionArchitecture, settings: ModelSettings, groups: ProcessGroupCollection
    ) -> None:
        config = vision_config(vision, settings)
        super().__init__(config=config)
        self.vision, self.recompute, self.tp_group = vision, settings.recompute_vision, groups.tp
        self.patch_embed = torch.nn.Linear(
            vision.patch_dim, vision.hidden_size, bias=vision.patch_embed_bias, dtype=settings.dtype
        )
        torch.nn.init.normal_(self.patch_embed.weight, std=config.init_method_std)
        if vision.num_position_embeddings is not None:
            self.position_embedding = torch.nn.Embedding(
                vision.num_position_embeddings, vision.hidden_size, dtype=settings.dtype
            )
            torch.nn.init.normal_(self.position_embedding.weight, std=config.init_method_std)
        spec = layer_spec(config, settings.attention_backend, is_causal=False)
        layer: Any = partial(build_module, spec, config=config, pg_collection=groups, add_layer_offset=False)
        self.layers = torch.nn.ModuleList(
            layer(layer_number=number + 1) for number in range(vision.num_layers)
        )
        self.merger = PatchMerger(config, vision, groups, norm_after_shuffle=False)
        self.deepstack_mergers = torch.nn.ModuleList(
            PatchMerger(config, vision, groups, norm_after_shuffle=True)
            for _ in vision.deepstack_visual_indexes
        )

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode all visual items of a micro-batch.

        Args:
            pixel_values: Flattened patches, [p, c] float32.
            grid_thw: [i, 3] int64, on the CPU.

        Returns: Merged tokens in reading order [m, h], and as many deepstack features [m, h] as there are levels.
        """
        layout = vision_layout(grid_thw.numpy(), self.vision)
        device = pixel_values.device
        hidden_states = self._embed(pixel_values, layout)
        head_dim = self.vision.hidden_size // self.vision.num_attention_heads
        places = to_device(layout.rows_and_columns, device)
        angles = vision_rope(places, head_dim, self.vision.rotary_base)
        frames = make_segments(layout.frame_lengths, device)
        windows = frames if layout.window_lengths is None else make_segments(layout.window_lengths, device)
        hidden_states = hidden_states[:, None]  # [p, 1, h]
        features = []
        for number, layer in enumerate(self.layers):
            is_full = layout.window_lengths is None or number in self.vision.fullatt_block_indexes
            hidden_states = self._run(layer, hidden_states, angles, frames if is_full else windows)
            if number in self.vision.deepstack_visual_indexes:
                level = self.vision.deepstack_visual_indexes.index(number)
                features.append(self.deepstack_mergers[level](hidden_states[:, 0]))
        merged = self.merger(hidden_states[:, 0])
        return (merged if layout.restore is None else merged[to_device(layout.restore, device)]), features

    def _embed(self, pixel_values: Tensor, layout: VisionLayout) -> Tensor:
        device = pixel_values.device
        if layout.order is not None:
            unit = self.vision.spatial_merge_size**2
            blocks = pixel_values.reshape(-1, unit * self.vision.patch_dim)
            pixel_values = blocks[to_device(layout.order, device)].reshape(-1, self.vision.patch_dim)
        hidden_states = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        if layout.table_index is not None and layout.table_weight is not None:
            entries = self.position_embedding(to_device(layout.table_index, device))  # [p, 4, h]
            weights = to_device(layout.table_weight, device)[:, :, None].to(entries.dtype)
            hidden_states = hidden_states + (entries * weights).sum(dim=1)
        return hidden_states

    def _run(
        self, layer: torch.nn.Module, hidden_states: Tensor, angles: Tensor, segments: Segments
    ) -> Tensor:
        def forward(hidden_states: Tensor) -> Tensor:
            return layer(
                hidden_states, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=segments
            )[0]

        if self.recompute and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(forward, False, hidden_states)
        return forward(hidden_states)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Sharded tensors by name; layers and mergers one by one, as module lists do not know how."""
        lists = {"layers": self.layers, "deepstack_mergers": self.deepstack_mergers}
        sharded: ShardedStateDict = {}
        for name, module in self.named_children():
            parts = (
                {f"{name}.{i}": part for i, part in enumerate(lists[name])}
                if name in lists
                else {name: module}
            )
            for key, part in parts.items():
                add = partial(sharded_state_dict_default, part, f"{prefix}{key}.", sharded_offsets, metadata)
                sharded.update(add(tp_group=self.tp_group))
        return sharded
