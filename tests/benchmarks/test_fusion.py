# SPDX-License-Identifier: Apache-2.0
"""What the fusion path may not do: loop over tokens in Python, or wait for the device once an image."""

import pytest
import torch

from benchmarks.fusion import count_calls, count_waits, encode, merge, pack


@pytest.mark.parametrize("images", [1, 6])
def test_python_calls_do_not_grow_with_tokens(images: int) -> None:
    merge(pack([encode(1, 16, 16)]))()  # the first backward of a process calls more
    counts = []
    for tokens in (16, 1024):
        sample = encode(images, tokens, 16 * tokens)
        batch = pack([sample, sample])
        counts.append(
            (
                count_calls(lambda tokens=tokens: encode(images, tokens, 16 * tokens)),
                count_calls(lambda sample=sample: pack([sample, sample])),
                count_calls(merge(batch)),
            )
        )
    assert counts[0] == counts[1]


def test_waits_for_the_device_do_not_grow_with_images() -> None:
    waits = [count_waits(merge(pack([encode(images, 64, 64)]))) for images in (1, 40)]
    assert waits == [0, 0]


def test_counters_see_what_they_are_for() -> None:
    values = torch.arange(50)

    def loop() -> list[float]:
        return [value.item() for value in values.unbind()]

    assert count_calls(loop) > 50
    assert count_waits(loop) == 50
    assert count_waits(values.nonzero) == 1
