# SPDX-License-Identifier: Apache-2.0
import torch

from models.generation.request import GenerationOptions
from models.generation.sampling import make_generators, sampling_scores

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draw(options: GenerationOptions, count: int) -> torch.Tensor:
    generators = make_generators([str(index) for index in range(count)], options.seed)
    return sampling_scores(LOGITS.expand(count, -1), generators, options).argmax(dim=-1)


def test_temperature_zero_is_greedy() -> None:
    assert draw(GenerationOptions(), 5).tolist() == [0] * 5


def test_sampling_draws_from_the_softmax() -> None:
    share = draw(GenerationOptions(temperature=1.0), 20_000).bincount(minlength=4) / 20_000
    # 4 standard deviations of a share of one half over 20,000 draws are 0.014; measured worst case 0.0034
    torch.testing.assert_close(share, LOGITS.exp(), atol=0.014, rtol=0.0)


def test_temperature_sharpens() -> None:
    share = draw(GenerationOptions(temperature=0.5), 20_000).bincount(minlength=4) / 20_000
    expected = LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum()
    torch.testing.assert_close(share, expected, atol=0.014, rtol=0.0)


def test_top_k_and_top_p_leave_the_tail_out() -> None:
    assert draw(GenerationOptions(temperature=1.0, top_k=2), 2000).max() == 1
    assert draw(GenerationOptions(temperature=1.0, top_p=0.7), 2000).max() == 1
    assert draw(GenerationOptions(temperature=1.0), 2000).max() == 3


def test_draws_follow_from_seed_and_key_alone() -> None:
    options = GenerationOptions(temperature=1.0, seed=3)
    keys = [str(index) for index in range(40)]
    together = sampling_scores(LOGITS.expand(40, -1), make_generators(keys, 3), options).argmax(dim=-1)
    alone = [
        sampling_scores(LOGITS[None], make_generators([key], 3), options).argmax().item() for key in keys
    ]
    assert together.tolist() == alone
    other = sampling_scores(LOGITS.expand(40, -1), make_generators(keys, 4), options).argmax(dim=-1)
    assert together.tolist() != other.tolist()
