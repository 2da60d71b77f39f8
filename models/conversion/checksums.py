# SPDX-License-Identifier: Apache-2.0
"""Hashes of tensors, read block by block."""

import hashlib

import torch

from models.conversion.sinks import row_blocks
from models.conversion.tensor_source import TensorSource


def checksum(source: TensorSource, name: str) -> str:
    """SHA-256 of a tensor's bytes in C order, hexadecimal."""
    digest = hashlib.sha256()
    for span in row_blocks(name, source.specs[name]):
        block = source.read(name, span.start, span.stop)
        digest.update(memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
