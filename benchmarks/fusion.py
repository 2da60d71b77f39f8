# SPDX-License-Identifier: Apache-2.0
"""Cost of the fusion path of one micro-batch: ``python -m benchmarks.fusion [--device cuda]``; prints JSON.

positions  placeholders expanded, position ids given, labels shifted (once a sample, in the loader)
packing    samples laid into one row
merge      vision tokens and deepstack features written over their placeholders (in the model, forward and backward)

Beside times it counts what must not grow: calls of Python functions with the number of tokens (a loop over tokens
would), and operations that wait for the device with the number of images.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.common.batch import Batch
from models.common.batching import build_batch
from models.common.fusion import dense_features, merge_tokens
from models.common.sequences import EncodedSample, MediaItem, encode_sample, grid_run
from models.contract.architecture import SpecialTokens

TOKENS = SpecialTokens(image=1, video=2, vision_start=3, vision_end=4)
WAITING = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal"})
"""Operations whose result the host needs before it can go on."""
HIDDEN, LEVELS, PATCH_DIM = 256, 3, 8


class CountWaits(TorchDispatchMode):
    """Counts operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in WAITING
        return func(*args, **(kwargs or {}))


def encode(num_images: int, tokens_per_image: int, text_tokens: int) -> EncodedSample:
    """One sample: every image between two text stretches of the same length."""
    side = max(1, round(tokens_per_image**0.5))
    height, width = side, tokens_per_image // side
    run = grid_run(TOKENS.image, 1, height, width)
    pixels = torch.zeros(4 * height * width, PATCH_DIM)
    item = MediaItem(
        kind="image", text="", runs=(run,), pixel_values=pixels, grid_thw=(1, 2 * height, 2 * width)
    )
    stretch = torch.full((max(1, text_tokens // (num_images + 1)),), 9)
    pieces = [stretch, *[part for _ in range(num_images) for part in (torch.tensor([TOKENS.image]), stretch)]]
    ids = torch.cat(pieces)
    return encode_sample("sample", ids, torch.ones_like(ids, dtype=torch.bool), [item] * num_images, TOKENS)


def pack(samples: list[EncodedSample]) -> Batch:
    """All samples in one row."""
    return build_batch(samples, pad_token=0, packing=True, multiple_of=8)


def merge(batch: Batch, device: str = "cpu") -> Callable[[], Tensor]:
    """The model's part: embeddings, tokens and deepstack features of a micro-batch, forward and backward."""
    assert batch.vision_positions is not None
    rows, length = batch.input_ids.shape
    count = batch.vision_positions.numel()
    embeddings = torch.zeros(length, rows, HIDDEN, device=device, requires_grad=True)
    tokens = torch.zeros(count, HIDDEN, device=device, requires_grad=True)
    features = [torch.zeros(count, HIDDEN, device=device, requires_grad=True) for _ in range(LEVELS)]
    positions = batch.vision_positions.to(device)

    def run() -> Tensor:
        merged = merge_tokens(embeddings, tokens, positions, kind="vision", batch=batch)
        levels = [dense_features(feature, positions, merged.shape) for feature in features]
        total = merged.sum() + sum(level.sum() for level in levels)
        total.backward()
        return total

    return run


def count_calls(work: Callable[[], Any]) -> int:
    """Python functions that `work` calls, C functions included."""
    count = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def count_waits(work: Callable[[], Any]) -> int:
    """Operations in `work` that wait for the device."""
    with CountWaits() as counter:
        work()
    return counter.count


def milliseconds(work: Callable[[], Any], *, device: str, repeats: int = 15) -> float:
    """Median time of `work`."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def measure(num_images: int, total_vision_tokens: int, text_tokens: int, device: str) -> dict[str, Any]:
    """One row: times and counts of a micro-batch of four samples."""
    per_image = max(1, total_vision_tokens // (4 * num_images))

    def positions() -> EncodedSample:
        return encode(num_images, per_image, text_tokens // 4)

    samples = [positions() for _ in range(4)]
    batch = pack(samples)
    work = merge(batch, device)
    return {
        "images": 4 * num_images,
        "vision_tokens": 4 * num_images * per_image,
        "real_tokens": batch.num_real_tokens,
        "positions_ms": 4 * milliseconds(positions, device="cpu"),
        "packing_ms": milliseconds(lambda: pack(samples), device="cpu"),
        "merge_ms": milliseconds(work, device=device),
        "python_calls": {
            "positions": count_calls(positions),
            "packing": count_calls(lambda: pack(samples)),
            "merge": count_calls(work),
        },
        "device_waits_in_merge": count_waits(work),
    }


def main() -> None:
    """Print both sweeps as JSON: more tokens in as many images, and more images of as many tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    result = {
        "device": device,
        "hidden_size": HIDDEN,
        "deepstack_levels": LEVELS,
        "more_tokens": [measure(4, tokens, tokens // 2, device) for tokens in (1024, 4096, 16384)],
        "more_images": [measure(images, 8192, 1024, device) for images in (1, 4, 16, 64)],
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
