# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from models.common.context_parallel import global_order, local_index
from models.contract.errors import ShapeError


def test_local_index_pairs_early_with_late_chunks() -> None:
    assert local_index([8], 2, 0).tolist() == [0, 1, 6, 7]
    assert local_index([8], 2, 1).tolist() == [2, 3, 4, 5]


def test_local_index_cuts_every_sample_of_a_pack() -> None:
    assert local_index([4, 8], 2, 0).tolist() == [0, 3, 4, 5, 10, 11]


def test_global_order_undoes_the_cut() -> None:
    lengths = [12, 24, 12]
    ranks = np.concatenate([local_index(lengths, 3, rank) for rank in range(3)])
    assert np.array_equal(ranks[global_order(lengths, 3)], np.arange(48))


def test_indivisible_sample_is_named() -> None:
    with pytest.raises(ShapeError, match="sample 1") as error:
        local_index([8, 6], 2, 0)
    assert "multiple of 2 * context_parallel_size = 4" in str(error.value)
