# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker on megatron-core: everything it needs is in common, told apart by its config."""

from megatron.core.process_groups_config import ProcessGroupCollection

from models.common.multimodal import MultimodalModel
from models.common.settings import ModelSettings
from models.qwen3_omni.config import ModelConfig


def build_model(
    config: ModelConfig,
    settings: ModelSettings,
    *,
    groups: ProcessGroupCollection | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> MultimodalModel:
    """Build one pipeline stage; with one stage, the whole model. See :class:`MultimodalModel`."""
    return MultimodalModel(
        config, settings, groups=groups, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
    )
