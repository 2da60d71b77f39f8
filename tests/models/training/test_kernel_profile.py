# SPDX-License-Identifier: Apache-2.0
"""Where a step goes: tables of a real one on a CPU, and of kernels that a GPU would have run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from models.contract.recipe import Recipe
from models.contract.site import Site
from models.training.kernel_profile import group_of, group_times, idle_table, kernel_times, tables
from models.training.progress import TrainOptions
from models.training.start import train


@pytest.mark.parametrize("engine", ["megatron", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_step_that_was_asked_for_is_written_and_no_other(
    engine: str, site: Site, make_recipe: Callable[..., Recipe], tmp_path: Path, rows_of: Callable[..., Any]
) -> None:
    recipe = make_recipe(train={"engine": engine})
    train(recipe, site, tmp_path / "plain", TrainOptions(stop_after=3))
    train(recipe, site, tmp_path / "run", TrainOptions(stop_after=3, profile=2))
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "plain")
    assert [path.name for path in tmp_path.glob("*/profile*")] == ["profile_0000002.md"]
    text = (tmp_path / "run" / "profile_0000002.md").read_text()
    assert text.startswith("# Iteration 2\n\n| what for | ms | share |\n")
    [products] = [line for line in text.splitlines() if line.startswith("| `aten::mm` |")]
    assert products.split("|")[2].strip() == "matrix products"
    assert "Adam" in text


def event(key: str, start: int, end: int) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, device_type=DeviceType.CUDA, is_user_annotation=False, count=2,
        self_device_time_total=1e3 * (end - start), time_range=SimpleNamespace(start=1e3 * start, end=1e3 * end),
    )  # fmt: skip


def test_a_device_has_kernels_and_gaps() -> None:
    found: Any = [
        event("nvjet_sm90", 0, 10),
        event("ncclDevKernel_AllGather", 5, 8),  # beside the first
        event("_adamw_step", 16, 20),
        event("Memcpy HtoD", 20, 21),
    ]
    profiler: Any = SimpleNamespace(events=lambda: found, key_averages=lambda: found)
    device = torch.device("cuda")
    times = kernel_times(profiler, device)
    assert times["nvjet_sm90"] == (10.0, 2)
    assert group_times(times) == {
        "matrix products": 10.0, "optimizer": 4.0, "communication": 3.0, "copies": 1.0,
    }  # fmt: skip
    text = idle_table(profiler, num_parts=3)
    assert text.startswith("Idle 6.0 of 21.0 ms; in each of 3 equal parts, in ms: 0.0 6.0 0.0\n")
    assert "| 6.00 | 10.0 | `nvjet_sm90` | `_adamw_step` |" in text
    assert "Idle 6.0" in tables(profiler, device)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("aten::addmm", "matrix products"),
        ("void at::native::elementwise_kernel", "other elementwise"),
    ],
)
def test_kernels_are_grouped_by_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group
