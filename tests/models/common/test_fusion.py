# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from models.common.fusion import dense_features, merge_tokens
from models.contract.errors import ShapeError


def test_merge_tokens_writes_in_reading_order_and_leaves_the_input() -> None:
    embeddings = torch.zeros(3, 2, 1)  # s = 3, b = 2
    merged = merge_tokens(
        embeddings, torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 3]), kind="vision"
    )
    assert merged[:, 0, 0].tolist() == [0, 1, 2]  # sample 0
    assert merged[:, 1, 0].tolist() == [3, 0, 0]  # sample 1
    assert not embeddings.any()


def test_dense_features_are_zero_at_text() -> None:
    features = dense_features(torch.tensor([[5.0]]), torch.tensor([2]), torch.Size([3, 1, 1]))
    assert features.flatten().tolist() == [0, 0, 5]


@pytest.mark.parametrize("count", [1, 3])
def test_wrong_number_of_tokens_says_both_numbers(count: int) -> None:
    with pytest.raises(ShapeError, match="vision tokens and placeholders do not match") as error:
        merge_tokens(torch.zeros(4, 1, 2), torch.zeros(count, 2), torch.tensor([0, 1]), kind="vision")
    assert f"got:      {count}" in str(error.value)
