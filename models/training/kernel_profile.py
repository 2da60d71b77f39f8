# SPDX-License-Identifier: Apache-2.0
"""Where a step goes on the device: its kernels, and what they are for."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.autograd import DeviceType

from models.training.progress import Run
from models.training.run_file import written

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("sdpa", "scaled_dot_product", "flash", "fmha", "compute_dot_do_o", "convert_dq")),
    (
        "matrix products",
        ("nvjet", "gemm", "cutlass", "cublas", "_add_weight_gradients", "::mm", "addmm", "bmm", "linearwith"),
    ),
    ("queries and keys", ("_split_forward", "_split_backward", "rope", "rotary")),
    ("norms", ("_norm_forward", "_norm_backward", "rmsnorm", "layernorm", "layer_norm", "normalization")),
    ("MLP activation", ("gated_act", "silu", "swiglu", "gelu", "dact", "act_kernel")),
    ("loss", ("_loss_forward", "_loss_backward", "cross_entropy", "online_softmax", "element_mul")),
    ("optimizer", ("multi_tensor", "adam", "l2norm", "normtwo")),
    ("experts' routing", ("permute", "topk", "sort", "router", "scan", "row_id_map")),
    ("communication", ("nccl", "gloo")),
    ("waiting for data", ("dataloader",)),
    ("fp8 casts", ("cast_", "quantize", "amax")),
    ("copies", ("memcpy", "memset", "copy", "cat", "fill")),
)
"""Group → parts of kernel names; the first that fits counts. What fits none is elementwise work of some kind."""
REST = "other elementwise"


@contextmanager
def profiled_step(run: Run) -> Iterator[None]:
    """Write where the time of the step that the block takes goes, if it is the one that was asked for; rank 0 does."""
    iteration, device = run.progress.iteration + 1, run.engine.ranks.device
    if run.options.profile != iteration or run.engine.ranks.rank:
        yield
        return
    with profiled(device) as profiler:
        yield
    path = run.directory / f"profile_{iteration:07d}.md"
    with written(run.directory):
        path.write_text(f"# Iteration {iteration}\n\n{tables(profiler, device)}", encoding="utf-8")


@contextmanager
def profiled(device: torch.device) -> Iterator[torch.profiler.profile]:
    """The profiler around a block, which ends with what it launched."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield profiler
        if device.type == "cuda":
            torch.cuda.synchronize()


def tables(profiler: torch.profiler.profile, device: torch.device) -> str:
    """Markdown: kernels by what they are for, each of them, and where a GPU had nothing to do."""
    text = profile_table(kernel_times(profiler, device))
    return f"{text}\n{idle_table(profiler)}" if device.type == "cuda" else text


def kernel_times(profiler: torch.profiler.profile, device: torch.device) -> dict[str, tuple[float, int]]:
    """Time in ms and number of calls of every kernel; on a CPU of every operator, without those it calls."""
    if device.type == "cuda":
        events = _on_device(profiler.key_averages())
        return {event.key: (event.self_device_time_total / 1e3, event.count) for event in events}
    return {event.key: (event.self_cpu_time_total / 1e3, event.count) for event in profiler.key_averages()}


def _on_device(events: Iterable[Any]) -> list[Any]:
    """Kernels and copies, without annotations."""
    return [
        event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def group_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    return next((group for group, parts in GROUPS if any(part in name for part in parts)), REST)


def group_times(kernels: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Device time in ms by group, the largest first."""
    times: dict[str, float] = {}
    for kernel, (time_ms, _) in kernels.items():
        group = group_of(kernel)
        times[group] = times.get(group, 0.0) + time_ms
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def idle_table(profiler: torch.profiler.profile, *, num_parts: int = 20, num_gaps: int = 12) -> str:
    """Markdown: in which parts of the step the device had nothing to do, and after which kernels longest."""
    events = _on_device(cast(Any, profiler.events()))
    spans = sorted((event.time_range.start, event.time_range.end, event.key) for event in events)
    begin, until = spans[0][0], max(end for _, end, _ in spans)
    part = (until - begin) / num_parts
    idle = [0.0] * num_parts
    gaps: list[tuple[float, float, str, str]] = []
    reached, last = begin, ""
    for start, end, name in spans:
        if start > reached:
            idle[min(int((reached - begin) / part), num_parts - 1)] += start - reached
            gaps.append((start - reached, reached - begin, last, name))
        if end > reached:
            reached, last = end, name
    lines = [
        f"Idle {sum(idle) / 1e3:.1f} of {(until - begin) / 1e3:.1f} ms; in each of {num_parts} equal parts, in ms: "
        + " ".join(f"{value / 1e3:.1f}" for value in idle),
        "", "| gap ms | at ms | after | before |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {gap / 1e3:.2f} | {at / 1e3:.1f} | `{before[:50]}` | `{after[:50]}` |"
        for gap, at, before, after in sorted(gaps, reverse=True)[:num_gaps]
    ]
    return "\n".join(lines) + "\n"


def profile_table(kernels: Mapping[str, tuple[float, int]], *, num_kernels: int = 60) -> str:
    """Markdown: time by group, then by kernel."""
    total = sum(time_ms for time_ms, _ in kernels.values())
    lines = ["| what for | ms | share |", "|---|---|---|"]
    lines += [
        f"| {group} | {time_ms:.1f} | {time_ms / total:.1%} |"
        for group, time_ms in group_times(kernels).items()
    ]
    lines += [f"| all | {total:.1f} | |", "", "| kernel | for | ms | calls |", "|---|---|---|---|"]
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:num_kernels]
    lines += [
        f"| `{name[:110]}` | {group_of(name)} | {time_ms:.1f} | {calls} |"
        for name, (time_ms, calls) in longest
    ]
    return "\n".join(lines) + "\n"
