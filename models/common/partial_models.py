# SPDX-License-Identifier: Apache-2.0
"""Transformers models of which only a part reads pictures and writes text: the part that trains and answers."""

from dataclasses import dataclass, field
from typing import Any

from models.contract.architecture import Architecture


@dataclass(frozen=True, slots=True)
class PartialModel:
    """What of a transformers model is used."""

    part: str = ""
    """Name of the submodule; empty for the whole model."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Config values to set before the model is built, so that the rest is not."""


PARTIAL_MODELS = {"qwen3_omni_moe": PartialModel("thinker", {"enable_audio_output": False})}
"""By transformers' `model_type`."""


def partial_model(architecture: Architecture) -> PartialModel:
    """The part of this architecture's transformers model that is used."""
    return PARTIAL_MODELS.get(architecture.hf_model_type, PartialModel())
