# SPDX-License-Identifier: Apache-2.0
"""Where a Megatron run's first weights come from: a Hugging Face folder, or a converted (torch_dist) checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from models.contract.errors import ConfigError, WeightMappingError
from models.conversion.dcp_folder import METADATA_FILE, TRACKER_FILE, find_iteration, model_weights, open_dcp
from models.conversion.load import load_hf_weights
from models.conversion.regions import Box, row_box
from models.conversion.torch_dist import sharded_tensors

logger = logging.getLogger(__name__)


def load_initial_weights(modules: Sequence[nn.Module], folder: Path, *, num_layers: int | None) -> None:
    """Fill this rank's part of the model from the checkpoint that a recipe names; every rank calls it.

    Args:
        modules: Model chunks of this rank.
        folder: Hugging Face folder, or a converted checkpoint with the config and tokenizer files beside it.
        num_layers: Decoder layers that the model keeps; None for all.

    Raises:
        ConfigError: the folder holds no weights of either kind.
        WeightMappingError: weights and model do not fit, or a file is broken.
    """
    if any(folder.glob("*.safetensors")):
        load_hf_weights(modules, folder, num_layers=num_layers)
    elif (folder / TRACKER_FILE).exists() or (folder / METADATA_FILE).exists():
        load_torch_dist_weights(modules, find_iteration(folder))
    else:
        raise ConfigError(
            "the checkpoint folder holds no weights",
            where=str(folder),
            expected=f"*.safetensors, or {TRACKER_FILE} of a converted checkpoint",
            got=", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "an empty folder",
            fix='download or convert the weights, or set model.init = "random"',
        )


@torch.no_grad()
def load_torch_dist_weights(modules: Sequence[nn.Module], folder: Path) -> None:
    """Fill this rank's part of the model from one iteration of a sharded checkpoint, written at any layout.

    Raises:
        WeightMappingError: a tensor is missing or has another shape.
    """
    with open_dcp(folder) as opened:
        weights = model_weights(opened)
        for shard in sharded_tensors(modules):
            found = weights.specs.get(shard.key)
            if found is None or found.shape != tuple(shard.global_shape):
                raise WeightMappingError(
                    "the model and the checkpoint do not fit", where=f"{folder}: {shard.key}",
                    expected=str(tuple(shard.global_shape)), got="nothing" if found is None else str(found.shape),
                    fix="convert the checkpoint that this config.json belongs to",
                )  # fmt: skip
            size = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
            box = Box(tuple(shard.global_offset), size)
            rows = weights.read(shard.key, box.start[0], box.start[0] + size[0])
            origin = row_box(found.shape, box.start[0], box.start[0] + size[0]).start
            assert shard.data is not None
            shard.data.copy_(rows[box.slices(origin)].reshape(shard.data.shape))
        opened.check_unchanged()
    logger.info("loaded the weights of %s", folder)
