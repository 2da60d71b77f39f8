# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from models.common.batch import Batch
from models.common.fusion import check_counts, dense_features, merge_tokens
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


def micro_batch(
    positions: list[int], grids: list[tuple[int, int, int]], *, cu_seqlens: list[int] | None
) -> Batch:
    width = 8 if cu_seqlens is None else 16
    return Batch(
        input_ids=torch.zeros(16 // width, width, dtype=torch.int64),
        position_ids=torch.zeros(3, 16 // width, width, dtype=torch.int64),
        vision_positions=torch.tensor(positions),
        grid_thw=torch.tensor(grids),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        sample_keys=("first", "second"),
    )


@pytest.mark.parametrize("cu_seqlens", [None, [0, 8, 16]])
@pytest.mark.parametrize(
    ("positions", "named"),
    [
        ([1, 2, 3, 9, 10], "sample 0 (first)"),  # three placeholders for an image of two tokens
        ([1, 2, 9, 10, 11], "sample 1 (second)"),
        ([1, 2, 9], "sample 1 (second)"),
    ],
)
def test_sample_with_more_placeholders_than_media_is_named(
    positions: list[int], named: str, cu_seqlens: list[int] | None
) -> None:
    batch = micro_batch(positions, [(1, 2, 4), (1, 2, 4)], cu_seqlens=cu_seqlens)  # two tokens each
    assert batch.vision_positions is not None
    with pytest.raises(ShapeError) as error:
        check_counts(torch.zeros(4, 1), batch.vision_positions, kind="vision", batch=batch)
    assert named in str(error.value)
