# SPDX-License-Identifier: Apache-2.0
"""Which modules a transformer layer is made of, for the torch and the TransformerEngine backend.

All give the same parameter names in a sharded checkpoint: TransformerEngine's linear layers hold the norm before
them (`linear_qkv.layer_norm_weight`), and separate norms, torch's and our own, are renamed to that.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from models.common.attention import TorchCoreAttention, te_core_attention
from models.common.norms import norm_of
from models.common.settings import AttentionBackend, ExpertsBackend, TokenDispatcherType
from models.common.token_dispatch import DispatchingMoELayer
from models.contract.recipe import OWN_FP8

FUSED_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

ALIGNMENT = 8
"""Half-precision elements in 16 bytes: below that a row of a matrix misses the GPU's fast copies."""


def residual_add(_training: bool, _is_fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
    """What a layer adds its residual with: no family has dropout, and a compiled function takes longer to call."""
    return _add


def _add(out_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _probability: float) -> Tensor:
    out, bias = out_and_bias
    return residual + (out if bias is None else out + bias)


RESIDUAL_ADD: Any = residual_add  # megatron-core takes the function, its annotation says a class


class AlignedRowParallelLinear(RowParallelLinear):
    """Pads the inner dimension of the product with zeros to a multiple of :data:`ALIGNMENT`; weights keep their shape.

    Qwen2.5-VL's vision MLP is 3,420 wide, for which cuBLAS falls back to kernels of an older generation: its three
    products took 2.7 ms a layer on an H200 with 20,480 patches.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        missing = (0, -weight.shape[-1] % ALIGNMENT)
        return super()._forward_impl(F.pad(input, missing), F.pad(weight, missing), *args, **kwargs)


def layer_spec(
    config: TransformerConfig,
    backend: AttentionBackend,
    *,
    is_causal: bool,
    is_moe: bool = False,
    experts_backend: ExpertsBackend = "te",
    moe_token_dispatcher_type: TokenDispatcherType = "alltoall",
    module: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    """Specification of one layer.

    Args:
        config: Sizes and options of the layer.
        backend: `torch` runs everywhere; `te` needs transformer_engine and a GPU.
        is_causal: Decoder layers are, vision layers are not.
        is_moe: Experts instead of a dense MLP.
        experts_backend: Whose products experts take, of the `te` backend's.
        moe_token_dispatcher_type: How tokens get to experts on other ranks.
        module: The layer class; with TransformerEngine it also gets the short way of :mod:`models.common.dense_layer`.

    Returns: What megatron-core builds a layer from.
    """
    if backend == "te":
        module = _with_short_way(module)
        submodules = _te_layer(config, is_causal=is_causal, is_moe=is_moe, experts_backend=experts_backend)
    else:
        submodules = _torch_layer(config, is_causal=is_causal, is_moe=is_moe)
    if is_moe:
        build: Any = submodules.mlp
        submodules.mlp = partial(build, moe_token_dispatcher_type=moe_token_dispatcher_type)
    return ModuleSpec(module=module, submodules=submodules)


@cache
def _with_short_way(module: type[TransformerLayer]) -> type[TransformerLayer]:
    from models.common.dense_layer import DenseLayer  # its kernels need Triton

    if module is TransformerLayer:
        return DenseLayer
    # What the class does around a layer it then does around the short way.
    bases: tuple[Any, ...] = (module, DenseLayer)
    return type(module.__name__, bases, {})


def _with_grouped_products(experts: type[Any]) -> type[Any]:
    from models.common.grouped_experts import with_grouped_products  # its kernels need Triton

    return with_grouped_products(experts)


def takes_own_kernels(config: TransformerConfig) -> bool:
    """Whether our own kernels stand around a layer's products.

    Where fp8's scales are known beforehand TransformerEngine's modules put out fp8 at once; where they are taken from
    what is put out, as in 16 bits, our own norms and the short way of :mod:`models.common.dense_layer` are faster.
    """
    return config.fp8 is None or config.fp8_recipe in OWN_FP8


def te_attends(config: TransformerConfig) -> bool:
    """Whether TransformerEngine has a kernel for a decoder's attention.

    Its fused ones take heads of a multiple of 8; others go unfused there, which cannot split a sequence.
    """
    assert config.kv_channels is not None
    return config.context_parallel_size == 1 or config.kv_channels % 8 == 0


def _mask_type(is_causal: bool) -> AttnMaskType:
    return AttnMaskType.causal if is_causal else AttnMaskType.no_mask


def _torch_layer(config: TransformerConfig, *, is_causal: bool, is_moe: bool) -> TransformerLayerSubmodules:
    norm = norm_of(config)
    qk_norm = norm if config.qk_layernorm else IdentityOp
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if is_moe:
        experts = partial(SequentialMLP, submodules=linears)
        mlp = partial(DispatchingMoELayer, submodules=MoESubmodules(experts=experts))
    else:
        mlp = partial(MLP.as_mlp_submodule, submodules=linears)
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": _mask_type(is_causal)},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=TorchCoreAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=RESIDUAL_ADD,
        pre_mlp_layernorm=norm,
        mlp=mlp,
        mlp_bda=RESIDUAL_ADD,
        sharded_state_dict_keys_map=_fused_norm_names(is_moe=is_moe),
    )


def _te_layer(
    config: TransformerConfig, *, is_causal: bool, is_moe: bool, experts_backend: ExpertsBackend
) -> TransformerLayerSubmodules:
    from megatron.core.extensions.transformer_engine import (
        TEActivationOp,
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelGroupedLinear,
        TERowParallelLinear,
    )
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

    from models.common.fused_layers import FusedSelfAttention, residual_norm_of

    has_own_norm = takes_own_kernels(config)
    norm: Any = (
        residual_norm_of(config) if has_own_norm else IdentityOp
    )  # puts out a pair, which the layer knows
    normed_linear = TEColumnParallelLinear if has_own_norm else TELayerNormColumnParallelLinear
    if is_moe:
        grouped = GroupedMLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
        )
        experts: Any = _with_grouped_products(TEGroupedMLP) if experts_backend == "grouped" else TEGroupedMLP
        mlp = partial(
            DispatchingMoELayer, submodules=MoESubmodules(experts=partial(experts, submodules=grouped))
        )
        mlp_norm = norm if has_own_norm else TENorm
    else:
        assert config.ffn_hidden_size is not None
        is_aligned = config.ffn_hidden_size % (ALIGNMENT * config.tensor_model_parallel_size) == 0
        linears = MLPSubmodules(
            linear_fc1=normed_linear,
            linear_fc2=TERowParallelLinear if is_aligned else AlignedRowParallelLinear,
            activation_func=TEActivationOp,  # megatron-core builds it where the config asks for it
        )
        mlp = partial(MLP.as_mlp_submodule, submodules=linears)
        mlp_norm = norm
    qk_norm = norm_of(config) if config.qk_layernorm else IdentityOp
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=FusedSelfAttention,
            params={"attn_mask_type": _mask_type(is_causal)},
            submodules=SelfAttentionSubmodules(
                linear_qkv=normed_linear,
                # Vision towers have thousands of short segments, over which cuDNN's packed backward goes one by one:
                # on an H200 it took 570 of 1,087 ms of a step with 20 images of 448 pixels. Torch's kernel does not.
                core_attention=te_core_attention()
                if is_causal and te_attends(config)
                else TorchCoreAttention,
                linear_proj=TERowParallelLinear,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=RESIDUAL_ADD,
        pre_mlp_layernorm=mlp_norm,
        mlp=mlp,
        mlp_bda=RESIDUAL_ADD,
        sharded_state_dict_keys_map=_fused_norm_names(is_moe=is_moe) if has_own_norm else {},
    )


def _fused_norm_names(*, is_moe: bool) -> dict[str, str]:
    """Names of separate norms in a checkpoint; the one before experts stands alone with every backend."""
    return {old: new for old, new in FUSED_NORM_NAMES.items() if not (is_moe and old == "pre_mlp_layernorm.")}


def final_norm(config: TransformerConfig, backend: AttentionBackend) -> type:
    """Norm after the last layer."""
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return norm_of(config)
