# SPDX-License-Identifier: Apache-2.0
"""Load-balanced slices of a sequence under context parallelism.

A sequence (each sample of a packed row on its own) is cut into 2*cp chunks; rank r keeps chunk r and chunk
2*cp - 1 - r, so that with a causal mask every rank has the same work. TransformerEngine expects this order.

    cp = 2, 8 tokens:   chunks  01 | 23 | 45 | 67     rank 0 keeps 01 67     rank 1 keeps 23 45
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.contract.errors import ShapeError


def local_index(lengths: Sequence[int], cp_size: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """Positions that a rank keeps, in the order it keeps them.

    Args:
        lengths: Length of every sample of the row; one number for an unpacked batch.
        cp_size: Ranks that share the sequence.
        cp_rank: Which of them.

    Returns: Index into the sequence, [s/cp].

    Raises:
        ShapeError: a length is not a multiple of 2*cp.
    """
    parts, start = [], 0
    for number, length in enumerate(lengths):
        if length % (2 * cp_size):
            raise ShapeError(
                "a sequence cannot be cut for context parallelism",
                where=f"sample {number} of the micro-batch",
                expected=f"a length that is a multiple of 2 * context_parallel_size = {2 * cp_size}",
                got=f"{length}",
                fix="pad every sample to that multiple (data.seq_length, or the packing's padding)",
            )
        chunk = length // (2 * cp_size)
        for number_of_chunk in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(np.arange(start + number_of_chunk * chunk, start + (number_of_chunk + 1) * chunk))
        start += length
    return np.concatenate(parts)


def global_order(lengths: Sequence[int], cp_size: int) -> npt.NDArray[np.int64]:
    """Index that puts the ranks' slices, laid one after the other, back into sequence order, [s]."""
    return np.argsort(np.concatenate([local_index(lengths, cp_size, rank) for rank in range(cp_size)]))
