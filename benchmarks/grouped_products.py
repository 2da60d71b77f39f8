# SPDX-License-Identifier: Apache-2.0
"""Time the products of a layer's experts, and block sizes of the kernel that adds up their weights' gradients.

    python -m benchmarks.grouped_products            # Qwen3-VL-30B-A3B: 128 experts, 8,192 tokens that go to 8 each
    python -m benchmarks.grouped_products --experts 16 --rows 65536

Prints one JSON line a product: TFLOP/s for rows spread evenly over the experts (0), and unevenly.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from models.common.kernels import grouped

BLOCKS = (
    (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 2), (128, 128, 32, 4, 4), (128, 128, 128, 8, 2),
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (64, 128, 64, 4, 4),
)  # fmt: skip
"""BLOCK_OUT, BLOCK_IN, BLOCK_ROWS, WARPS, STAGES."""
REPEATS = 10


def milliseconds(call: Callable[[], object]) -> float:
    """Mean time of a call on the device, after some to warm up."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def group_ends(num_experts: int, num_rows: int, spread: float, device: str) -> Tensor:
    """Ends of groups [e] int32 whose sizes have a log-normal spread."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.softmax(spread * torch.randn(num_experts, generator=generator), dim=0)
    ends = (shares.cumsum(0) * num_rows).round().int().clamp(max=num_rows)
    ends[-1] = num_rows
    return ends.to(device)


def measure(num_out: int, num_in: int, ends: Tensor, num_rows: int, spread: float) -> None:
    """Print a line for each product with weights [e, num_out, num_in]."""
    device, bf16 = ends.device, torch.bfloat16
    rows = torch.randn(num_rows, num_in, device=device, dtype=bf16)
    d_out = torch.randn(num_rows, num_out, device=device, dtype=bf16)
    weights = torch.randn(len(ends), num_out, num_in, device=device, dtype=bf16)
    main_grads = torch.zeros(len(ends), num_out, num_in, device=device)

    def say(name: str, call: Callable[[], object], **more: object) -> None:
        tflops = 2e-9 * num_rows * num_out * num_in / milliseconds(call)
        row = {"product": name, "out": num_out, "in": num_in, "spread": spread, "tflops": round(tflops, 1)}
        print(json.dumps(row | more), flush=True)

    say("rows", lambda: grouped.grouped_linear(rows, weights, ends))
    say("rows backward", lambda: grouped.grouped_linear_backward(d_out, weights, ends))
    say("weights, to bf16 by torch", lambda: torch._grouped_mm(d_out.t(), rows, offs=ends))
    for blocks in BLOCKS:
        grouped.BLOCK_OUT, grouped.BLOCK_IN, grouped.BLOCK_ROWS, grouped.WARPS, grouped.STAGES = blocks
        grouped._constants.cache_clear()
        say(
            "weights, added in fp32",
            lambda: grouped._launch(d_out, rows, ends, main_grads, accumulates=True),
            blocks=blocks,
        )


def main() -> None:
    """Both products of an expert, with even and uneven groups."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=768)
    options = parser.parse_args()
    for spread in (0.0, 1.0):
        ends = group_ends(options.experts, options.rows, spread, "cuda")
        measure(2 * options.ffn, options.hidden, ends, options.rows, spread)
        measure(options.hidden, options.ffn, ends, options.rows, spread)


if __name__ == "__main__":
    main()
