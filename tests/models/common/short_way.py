# SPDX-License-Identifier: Apache-2.0
"""Our kernels and the short way through a layer around torch's linear layers: interpreted, they run on a CPU."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer

from models.common import decoder, vision
from models.common.fused_layers import FusedSelfAttention, residual_norm_of
from models.common.specs import _with_short_way, layer_spec


def with_our_modules(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """The torch backend's layer with our norms and attention."""
    norm: Any = residual_norm_of(config)
    submodules: Any = spec.submodules
    attention = dataclasses.replace(submodules.self_attention, module=FusedSelfAttention)
    spec.submodules = dataclasses.replace(
        submodules, self_attention=attention, input_layernorm=norm, pre_mlp_layernorm=norm
    )
    return spec


def short_way_spec(
    config: TransformerConfig,
    backend: str,
    *,
    module: type[TransformerLayer] = TransformerLayer,
    **options: Any,
) -> ModuleSpec:
    """:func:`models.common.specs.layer_spec` as on a GPU, but for the linear layers and the attention core."""
    assert backend == "torch"
    spec = layer_spec(config, "torch", module=_with_short_way(module), **options)
    return with_our_modules(spec, config)


@contextmanager
def short_way_everywhere() -> Iterator[None]:
    """Models that are built meanwhile take the short way."""
    users: tuple[Any, ...] = (decoder, vision)
    for user in users:
        user.layer_spec = short_way_spec
    try:
        yield
    finally:
        for user in users:
            user.layer_spec = layer_spec
