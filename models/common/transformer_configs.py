# SPDX-License-Identifier: Apache-2.0
"""megatron-core configs from an architecture and settings. Nothing else decides a size or an option."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from models.common.settings import ModelSettings
from models.contract.architecture import TextArchitecture, VisionArchitecture
from models.contract.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str, *, where: str) -> Callable[[Tensor], Tensor]:
    """Activation function by its HF name. Raises ConfigError for one that no family uses."""
    if name not in ACTIVATIONS:
        raise ConfigError("unknown activation", where=where, expected=", ".join(ACTIVATIONS), got=name)
    return ACTIVATIONS[name]


def decoder_config(text: TextArchitecture, settings: ModelSettings) -> TransformerConfig:
    """Config of the decoder."""
    is_cuda = settings.device == "cuda"
    pipeline = settings.pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=settings.num_layers or text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_query_groups,
        kv_channels=text.kv_channels,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=text.add_qkv_bias,
        qk_layernorm=text.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=text.layernorm_epsilon,
        mrope_section=list(text.mrope_section),
        bias_activation_fusion=is_cuda and not has_te_activation(text, settings),
        use_te_activation_func=has_te_activation(text, settings),
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=settings.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=settings.num_layers_in_last_pipeline_stage,
        variable_seq_lengths=pipeline > 1 and settings.variable_seq_lengths,
        # Interleaved stages of two ranks send both ways between the same pair: only the overlapped path orders that.
        overlap_p2p_comm=settings.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=settings.virtual_pipeline_model_parallel_size is None,
        context_parallel_size=settings.context_parallel_size,
        sequence_parallel=settings.sequence_parallel,
        expert_model_parallel_size=settings.expert_model_parallel_size,
        expert_tensor_parallel_size=settings.expert_tensor_parallel_size,
        # Layers get their own keys in checkpoints, whatever the pipeline.
        hetereogenous_dist_checkpoint=True,
        **_recompute(text, settings),
        **_moe(text, settings),
        **_fp8(settings),
        **_common(settings),
    )


def vision_config(vision: VisionArchitecture, settings: ModelSettings) -> TransformerConfig:
    """Config of the vision tower: tensor parallel, and nothing else is split. Always in full precision of `dtype`."""
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        gated_linear_unit=vision.gated_linear_unit,
        add_bias_linear=True,
        normalization=vision.normalization,
        layernorm_epsilon=vision.layernorm_epsilon,
        **_vision_activation(vision, settings),
        hetereogenous_dist_checkpoint=True,
        **_common(settings),
    )


def is_fused(settings: ModelSettings) -> bool:
    """Whether TransformerEngine's fused kernels run: on a GPU, with its backend."""
    return settings.device == "cuda" and settings.attention_backend == "te"


def has_te_activation(text: TextArchitecture, settings: ModelSettings) -> bool:
    """Whether the decoder's MLP takes TransformerEngine's SwiGLU; experts have a fused one of their own."""
    return is_fused(settings) and text.moe is None


def _vision_activation(vision: VisionArchitecture, settings: ModelSettings) -> dict[str, Any]:
    """Activation of the vision MLP, fused with its bias where megatron-core has a kernel for it.

    Its fused `F.gelu` is the tanh approximation, so it stands for `gelu_pytorch_tanh` and not for `gelu`.
    """
    fused = {("silu", True): F.silu, ("gelu_pytorch_tanh", False): F.gelu}
    kind = (vision.hidden_act, vision.gated_linear_unit)
    if settings.device == "cuda" and kind in fused:
        return {"activation_func": fused[kind], "bias_activation_fusion": True}
    return {
        "activation_func": activation(vision.hidden_act, where="vision_config: hidden_act"),
        "bias_activation_fusion": False,
    }


def _common(settings: ModelSettings) -> dict[str, Any]:
    return {
        "params_dtype": settings.dtype,
        "pipeline_dtype": settings.dtype,
        "autocast_dtype": settings.dtype,
        "bf16": settings.dtype == torch.bfloat16,
        "fp16": settings.dtype == torch.float16,
        "init_method_std": settings.init_method_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": settings.tensor_model_parallel_size,
        "use_cpu_initialization": settings.device != "cuda",
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        # The fused kernel takes one angle per row of [s, 1, n, d]; with more than one row megatron-core goes unfused.
        "apply_rope_fusion": is_fused(settings),
        "calculate_per_token_loss": settings.calculate_per_token_loss,
        "transformer_impl": "transformer_engine" if settings.attention_backend == "te" else "local",
    }


def _recompute(text: TextArchitecture, settings: ModelSettings) -> dict[str, Any]:
    if settings.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": settings.recompute_num_layers,
        }
    if settings.recompute == "none":
        return {}
    # Flash attention keeps no scores, so its core is not worth computing twice; dense layers choose on their own.
    has_fused_experts = text.moe is not None and settings.attention_backend == "te"
    can_recompute = settings.fp8 != "delayed"  # whose scales would be updated twice
    return {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act"] if has_fused_experts and can_recompute else ["core_attn"],
    }


def _moe(text: TextArchitecture, settings: ModelSettings) -> dict[str, Any]:
    moe = text.moe
    # Said for dense models too: megatron-core checks it against variable sequence lengths.
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    if moe is None:
        return dispatcher
    coefficient = moe.aux_loss_coeff if settings.moe_aux_loss_coeff is None else settings.moe_aux_loss_coeff
    layers = settings.num_layers or text.num_layers
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": [0 if layer in moe.dense_layers else 1 for layer in range(layers)],
        # Softmax over the chosen experts equals HF's softmax over all, renormalised over the chosen.
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if coefficient else "none",
        "moe_aux_loss_coeff": coefficient,
        **dispatcher,
        "moe_grouped_gemm": settings.attention_backend == "te",
        "moe_permute_fusion": settings.attention_backend == "te",
    }


def _fp8(settings: ModelSettings) -> dict[str, Any]:
    if settings.fp8 is None:
        return {}
    return {
        "fp8": "hybrid" if settings.fp8 in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": settings.fp8,
    }
