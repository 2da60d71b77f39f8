# SPDX-License-Identifier: Apache-2.0
"""Stock megatron-core on a CPU with gloo: every patch that takes, one function each, and nothing else.

megatron-core 0.19.2 names the device "cuda" in its schedules, optimizers and buffers, asks `torch.cuda` for streams and
random states, and counts on copies from a device. None of that changes the mathematics. The patches are listed in
every result (`run.json`: environment), so that a CPU number is never taken for an unpatched one.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core
import torch

from models.contract.errors import EnvironmentMismatch

TESTED_VERSIONS = ("0.19.2",)

Replace = Callable[[Any, str, Any], None]

MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)


@contextlib.contextmanager
def cpu_megatron() -> Iterator[tuple[str, ...]]:
    """Run a block with the patches in force; yields their names. Everything is put back afterwards.

    Raises:
        EnvironmentMismatch: a CUDA device is present, or megatron-core is a version these patches were not checked on.
    """
    _check_environment()
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for patch in PATCHES:
            patch(replace)
        yield tuple(patch.__name__ for patch in PATCHES)


def enable_cpu() -> tuple[str, ...]:
    """Put the patches in force for the rest of the process; returns their names. A second call does nothing more.

    Raises:
        EnvironmentMismatch: as :func:`cpu_megatron`.
    """
    if not _in_force:
        _in_force.append(cpu_megatron())
        _in_force[0].__enter__()
    return tuple(patch.__name__ for patch in PATCHES)


_in_force: list[contextlib.AbstractContextManager[tuple[str, ...]]] = []


def _check_environment() -> None:
    if torch.cuda.is_available():
        raise EnvironmentMismatch(
            "the CPU patches would hide a GPU",
            expected="a process without CUDA devices",
            got=f"{torch.cuda.device_count()} CUDA device(s)",
            fix="set CUDA_VISIBLE_DEVICES to the empty string, or run on the GPU",
        )
    if megatron.core.__version__.partition("+")[0] not in TESTED_VERSIONS:
        raise EnvironmentMismatch(
            "the CPU patches were not checked on this megatron-core",
            expected=f"megatron-core {', '.join(TESTED_VERSIONS)}",
            got=f"megatron-core {megatron.core.__version__}",
            fix="install the pinned version, or go through models/training/cpu.py and extend TESTED_VERSIONS",
        )


class _CpuTorch:
    """The torch module as a patched module sees it: factories put "cuda" tensors on the CPU."""

    FACTORIES = frozenset(
        {"zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "device"}
    )

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _on_cpu(value) if name in self.FACTORIES else value


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    if factory is torch.device:
        return _CpuDevice

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _DeviceType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.device)

    def __call__(cls, *args: Any) -> torch.device:
        made = torch.device(*args)
        return torch.device("cpu") if made.type == "cuda" else made


class _CpuDevice(metaclass=_DeviceType):
    """Stands in for `torch.device`, in calls and in isinstance."""


def cuda_device_literals(replace: Replace) -> None:
    """`device="cuda"` is written out in these modules; they get a torch whose factories read it as the CPU."""
    cpu_torch = _CpuTorch()
    for name in MODULES_WITH_CUDA_LITERALS:
        replace(importlib.import_module(name), "torch", cpu_torch)


def current_device_is_cpu(replace: Replace) -> None:
    """Buffers and communication tensors are made on `torch.cuda.current_device()`."""
    replace(torch.cuda, "current_device", lambda: torch.device("cpu"))


def tensor_cuda_is_identity(replace: Replace) -> None:
    """`tensor.cuda()` moves embeddings and optimizer states; here they are where they belong."""
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


def tensor_type_names_cuda(replace: Replace) -> None:
    """The optimizers sort parameters by `tensor.type()` and know only the `torch.cuda.*` names."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    replace(torch.Tensor, "type", type_name)


class _Stream:
    """A stream or an event with nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, *args: Any) -> "_Stream":
        return self


def streams_and_events(replace: Replace) -> None:
    """Communication and copies are ordered by CUDA streams; on a CPU everything is already in order."""
    only = _Stream()
    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "Event", _Stream)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "synchronize", lambda *args: None)
    replace(torch.cuda, "empty_cache", lambda: None)
    for name in ("current_stream", "default_stream"):
        replace(torch.cuda, name, lambda *args: only)


def random_states(replace: Replace) -> None:
    """The RNG tracker forks CUDA generators; the CPU generator takes their place."""
    from megatron.core.tensor_parallel import random

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    replace(random, "_get_cuda_rng_state", get_state)
    replace(random, "_set_cuda_rng_state", set_state)
    replace(torch.cuda, "get_rng_state", get_state)
    replace(torch.cuda, "set_rng_state", set_state)
    replace(torch.cuda, "manual_seed", torch.manual_seed)


def expert_split_sizes(replace: Replace) -> None:
    """The MoE dispatcher turns split sizes that lie on a GPU into numpy arrays; on the CPU it must do so too.

    Under expert tensor parallelism it gathers and scatters parts of different sizes, which NCCL does and gloo does not.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(
        input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter_parts(
        input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].clone()

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu)
    replace(mappings, "_gather_along_first_dim", gather_parts)
    replace(mappings, "_reduce_scatter_along_first_dim", scatter_parts)


def router_without_compiler(replace: Replace) -> None:
    """One small method of the router goes through torch.compile, which on a CPU calls a C++ compiler for seconds."""
    from megatron.core.transformer.moe.router import TopKRouter

    compiled = TopKRouter._apply_expert_bias
    replace(TopKRouter, "_apply_expert_bias", getattr(compiled, "_torchdynamo_orig_callable", compiled))


PATCHES: tuple[Callable[[Replace], None], ...] = (
    cuda_device_literals,
    current_device_is_cpu,
    tensor_cuda_is_identity,
    tensor_type_names_cuda,
    streams_and_events,
    random_states,
    expert_split_sizes,
    router_without_compiler,
)
