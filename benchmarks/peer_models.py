# SPDX-License-Identifier: Apache-2.0
"""The sides of `benchmarks.gpu_peer`: one config and one micro-batch as ours, transformers' and mcore-bridge's model.

Every side has random weights, keeps all activations, has no optimizer and no auxiliary loss of routers, and takes the
mean loss over the same labels:

    ours            the backends that `auto` takes
    transformers    SDPA, experts through grouped_mm. A packed row goes in as a batch of its samples, which are equally
                    long: the same work without the mask over the whole row that SDPA would need
    mcore_bridge    ms-swift's Megatron models (https://github.com/modelscope/mcore-bridge), set up as `megatron sft` of
                    ms-swift 4.6 does: TransformerEngine, its fusions, rows always with cu_seqlens (`padding_free`)
"""

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.peer_case import SEQ_LENGTH, PeerCase
from models.common.batch import IGNORED_LABEL, Batch
from models.common.settings import ModelSettings, resolve_attention_backend
from models.contract.families import architecture_from_hf, family_part
from models.contract.launcher import read_launcher_environment
from models.datasets.fixed_shapes import RowShape, fixed_batch
from models.training.parallel import start_megatron, stop_distributed

INIT_STD = 0.02

Build = Callable[[dict[str, Any], torch.device, torch.dtype], Any]
Ready = Callable[[nn.Module, Batch], Callable[[], Tensor]]
"""Lays a batch out as a model takes it, once; what it returns runs the forward pass to the mean loss."""


def build_ours(hf_config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Our model with the backend that `auto` takes. megatron-core's groups must be up."""
    architecture = architecture_from_hf(hf_config)
    attention_backend = resolve_attention_backend("auto", device.type)
    settings = ModelSettings(
        device=device.type, dtype=dtype, init_method_std=INIT_STD, moe_aux_loss_coeff=0.0,
        attention_backend=attention_backend, experts_backend="grouped" if attention_backend == "te" else "te",
    )  # fmt: skip
    return family_part(architecture.family, "model").build_model(architecture, settings).to(device)


def ready_ours(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Ours takes a batch as it is."""
    return lambda: model(batch).sum() / batch.num_supervised_tokens


def transformers_config(hf_config: dict[str, Any]) -> Any:
    """Transformers' config object, with the fastest kernels that it brings itself."""
    config = transformers.CONFIG_MAPPING[hf_config["model_type"]].from_dict(hf_config)
    config._attn_implementation = "sdpa"
    if hf_config.get("text_config", {}).get("num_experts"):
        config._experts_implementation = "grouped_mm"
    return config


def build_transformers(hf_config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Transformers' model."""
    kind = getattr(transformers, hf_config["architectures"][0])
    with torch.device(device):
        model = kind._from_config(transformers_config(hf_config), dtype=dtype)
    return model.train()


def ready_transformers(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Without a mask SDPA is told that attention is causal; a cache would only copy keys and values."""
    assert batch.labels is not None
    labels, rows = batch.labels.flatten(), len(batch.sample_lengths)
    inputs = media(batch) | {
        "input_ids": batch.input_ids.view(rows, -1),  # [1, s] -> [n, s/n]
        "position_ids": batch.position_ids.view(3, rows, -1),  # [3, 1, s] -> [3, n, s/n]
    }

    def loss() -> Tensor:
        logits = model(**inputs, use_cache=False).logits.float()
        return cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED_LABEL)

    return loss


def media(batch: Batch) -> dict[str, Tensor]:
    """Images of a batch by the names that transformers and mcore-bridge share."""
    if batch.pixel_values is None or batch.grid_thw is None:
        return {}
    return {"pixel_values": batch.pixel_values, "image_grid_thw": batch.grid_thw.to(batch.input_ids.device)}


def build_mcore_bridge(hf_config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """mcore-bridge's model. megatron-core's groups must be up; importing it patches megatron-core for the process."""
    from mcore_bridge import (  # pyright: ignore[reportMissingImports]
        ModelConfig,
        get_mcore_model,
        hf_to_mcore_config,
    )
    from megatron.core.transformer.enums import AttnBackend

    config = transformers_config(hf_config)
    fields = hf_to_mcore_config(config) | {
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "perform_initialization": True,  # as it loads weights, it would leave memory as it found it
        "init_method_std": INIT_STD,
        # It reads this one from a folder's config.json; from an object it takes the decoder's default.
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        # Not `flash`, ms-swift's default: that is the package flash-attn alone, and auto takes it where it is there.
        "attention_backend": AttnBackend.auto,
        "masked_softmax_fusion": True,
        "bias_dropout_fusion": True,
        "bias_activation_fusion": True,
        "apply_rope_fusion": False,  # ms-swift turns it off for positions of three dimensions
        "cross_entropy_loss_fusion": True,
        "gradient_accumulation_fusion": False,  # it adds to buffers of an optimizer, which no side has
        "calculate_per_token_loss": True,
        "moe_permute_fusion": True,
    }
    (model,) = get_mcore_model(ModelConfig(**fields))
    return model.to(device).train()


def ready_mcore_bridge(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Labels to be ignored go in, and what the model makes of them is masked, as its own example does."""
    from megatron.core.packed_seq_params import PackedSeqParams

    assert batch.labels is not None
    length, longest = batch.input_ids.shape[1], max(batch.sample_lengths)
    bounds = torch.tensor([0, length], dtype=torch.int32) if batch.cu_seqlens is None else batch.cu_seqlens
    cu_seqlens = bounds.to(batch.input_ids.device)
    segments = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest, max_seqlen_kv=longest,
    )  # fmt: skip
    is_supervised = batch.labels != IGNORED_LABEL
    inputs = media(batch) | {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "labels": batch.labels,
    }

    def loss() -> Tensor:
        losses = model(**inputs, attention_mask=None, packed_seq_params=segments)  # [1, s]
        return (losses * is_supervised).sum() / batch.num_supervised_tokens

    return loss


SIDES: dict[str, tuple[Build, Ready]] = {
    "transformers": (build_transformers, ready_transformers),
    "mcore_bridge": (build_mcore_bridge, ready_mcore_bridge),
    "ours": (build_ours, ready_ours),
}


def make_batch(hf_config: dict[str, Any], case: PeerCase) -> Batch:
    """The micro-batch of a case, on the CPU: the same one in every process."""
    shape = RowShape(
        seq_length=SEQ_LENGTH, num_images=case.num_images, image_size=case.image_size,
        num_samples=case.num_samples,
    )  # fmt: skip
    return fixed_batch(architecture_from_hf(hf_config), shape)


def time_side(side: str, case: PeerCase) -> dict[str, Any]:
    """Time one side on this process's GPU, and leave its memory free.

    Returns: `ms`, the median of forward and backward; `gib`, the peak of memory in tensors; `loss` of the last repeat;
    `device`.
    """
    from benchmarks.gpu_step import case_parser, make_recipe

    hf_config = case.hf_config()
    architecture = architecture_from_hf(hf_config)
    recipe = make_recipe(case_parser().parse_args(["--model", case.model]), 1, architecture)
    start_megatron(recipe, read_launcher_environment(), timeout_s=300)
    try:
        return _time(side, hf_config, make_batch(hf_config, case).to("cuda"))
    finally:
        stop_distributed()
        gc.collect()
        torch.cuda.empty_cache()


def _time(side: str, hf_config: dict[str, Any], batch: Batch) -> dict[str, Any]:
    build, ready = SIDES[side]
    model = build(hf_config, torch.device("cuda"), torch.bfloat16)
    forward = ready(model, batch)
    torch.cuda.reset_peak_memory_stats()
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        model.zero_grad(set_to_none=True)
        out = forward()
        out.backward()
        loss = out.detach()

    ms = median_ms(step)
    return {
        "ms": round(ms, 1),
        "gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss": round(loss.item(), 4),
        "device": torch.cuda.get_device_name(),
    }


def median_ms(step: Callable[[], None], *, repeats: int = 6, warm_up: int = 3) -> float:
    """Median time of a step on the device."""
    times = []
    for _ in range(repeats + warm_up):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warm_up:])
