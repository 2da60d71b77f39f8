# SPDX-License-Identifier: Apache-2.0
"""Runs two checkpoints on the fixed multimodal batch: one in transformers, the other in our model."""

from pathlib import Path
from typing import Literal

from torch import Tensor

from models.contract.errors import ConfigError
from models.contract.families import family_part, load_architecture
from models.contract.site import Site
from models.conversion.dcp_folder import find_iteration
from models.entry.generation_engine import locate, open_checkpoint
from models.generation.checkpoint import CheckpointSource
from models.generation.logits import (
    LogitsRow,
    compare_logits,
    fixed_batch,
    megatron_logits,
    transformers_logits,
)


def verify_logits(left: Path, right: Path) -> list[LogitsRow]:
    """Compare logits in fp32 and bf16. One model is in memory at a time.

    Args:
        left: HF folder or torch_dist checkpoint; the first of the two that is a HF folder runs in transformers.
        right: The other one; runs in our model.

    Raises:
        ConfigError: neither is a HF folder, or it has no tokenizer.
        WeightMappingError: the weights do not fit the model.
    """
    reference, checked = (left, right) if _is_hf(left) else (right, left)
    if not _is_hf(reference):
        raise ConfigError(
            "no Hugging Face folder to compare logits with", where=f"{left} and {right}",
            expected="config.json and tokenizer in one of them", fix="leave --logits out, or name the HF folder",
        )  # fmt: skip
    oracle = locate(str(reference), hf_folder=None, site=Site())
    model = (
        CheckpointSource(checked)
        if _is_hf(checked)
        else CheckpointSource(oracle.hf_folder, find_iteration(checked))
    )
    requests = fixed_batch(family_part(load_architecture(oracle.hf_folder).family, "data").MEDIA_KINDS)

    def expected(dtype: Literal["fp32", "bf16"]) -> Tensor:
        with open_checkpoint(oracle, engine="transformers", dtype=dtype) as opened:
            return transformers_logits(opened.engine, requests)

    def found(dtype: Literal["fp32", "bf16"]) -> Tensor:
        with open_checkpoint(model, engine="megatron", dtype=dtype) as opened:
            return megatron_logits(opened.engine, requests)

    fp32 = expected("fp32")
    return [
        compare_logits("fp32", found("fp32"), fp32),
        compare_logits("bf16", found("bf16"), fp32, expected("bf16")),
    ]


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
