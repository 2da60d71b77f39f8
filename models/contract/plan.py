# SPDX-License-Identifier: Apache-2.0
"""What a recipe would take on a class of devices, and the smallest change that makes it fit. Torch-free."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.flops import megatron_flops
from models.contract.layout import check_layout
from models.contract.memory import GIB, MemoryEstimate, ParameterCounts, count_parameters, estimate_memory
from models.contract.recipe import Recipe, parse_recipe

SHARE_OF_PEAK = 0.4
"""Share of the dense peak that an estimate assumes where no measurement says how long a step takes."""
WEIGHT_BYTES = 2
"""Of one parameter in a checkpoint without optimizer."""
OPTIMIZER_BYTES = 12
"""fp32 main weight and two moments of one parameter."""

Change = tuple[str, Callable[[Recipe], dict[str, dict[str, Any]] | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """One recipe on one class of devices."""

    parameters: ParameterCounts
    memory: MemoryEstimate
    available_bytes: float
    flops_per_step: float
    """By Megatron's formula."""
    padded_tokens_per_step: int
    num_devices: int
    expected_step_time_s: float | None
    """None where the class has no dense peak."""
    checkpoint_bytes: float
    suggestion: str | None
    """Smallest change that fits; None when it fits as it is."""

    @property
    def fits(self) -> bool:
        """Whether the fullest device has room."""
        return self.memory.total <= self.available_bytes

    def lines(self) -> list[str]:
        """For people."""
        parts = {
            "weights": self.memory.weights, "gradients": self.memory.gradients, "optimizer": self.memory.optimizer,
            "activations": self.memory.activations, "logits": self.memory.logits,
        }  # fmt: skip
        text = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
        verdict = "fits" if self.fits else "does not fit"
        tokens = self.padded_tokens_per_step
        rows = [
            f"parameters:   {self.parameters.total / 1e9:.2f} billion",
            f"memory:       {self.memory.total / GIB:.1f} of {self.available_bytes / GIB:.0f} GiB a device, {verdict}",
            f"              {text} GiB",
            f"work:         {self.flops_per_step / 1e15:.2f} PFLOP a step (megatron_lm_padded)",
        ]
        if self.expected_step_time_s is not None:
            rate = tokens / self.expected_step_time_s / self.num_devices
            rows.append(
                f"expected:     {self.expected_step_time_s:.2f} s a step, {rate:.0f} padded tokens/s a device, "
                f"at {SHARE_OF_PEAK:.0%} of peak"
            )
        rows.append(f"checkpoint:   {self.checkpoint_bytes / GIB:.1f} GiB each")
        if self.suggestion:
            rows.append(f"would fit:    {self.suggestion}")
        return rows

    def misfit(self) -> str:
        """Why it cannot run, and what would."""
        return (
            f"{self.memory.total / GIB:.1f} GiB are needed and a device has {self.available_bytes / GIB:.0f} "
            f"(smallest change that fits: {self.suggestion})"
        )


def checkpoint_bytes(recipe: Recipe, architecture: Architecture) -> float:
    """Size of one checkpoint on disk."""
    total = count_parameters(architecture, num_layers=recipe.model.num_layers).total
    weight = 4 if recipe.precision.dtype == "fp32" else WEIGHT_BYTES
    return total * (weight + (OPTIMIZER_BYTES if recipe.checkpoint.save_optimizer else 0))


def plan_training(
    recipe: Recipe,
    architecture: Architecture,
    *,
    memory_gib: float,
    bf16_tflops: float | None,
    share_of_peak: float = SHARE_OF_PEAK,
) -> TrainingPlan:
    """Work out what one recipe would take on devices with `memory_gib` and a dense peak of `bf16_tflops`."""
    available = memory_gib * GIB
    memory = estimate_memory(recipe, architecture)
    flops = megatron_flops(
        architecture.text, num_sequences=recipe.train.global_batch_size, seq_length=recipe.data.seq_length
    )
    rate = None if bf16_tflops is None else bf16_tflops * 1e12 * share_of_peak * recipe.num_processes
    counts = count_parameters(architecture, num_layers=recipe.model.num_layers)
    suggestion = None
    if memory.total > available:
        suggestion = (
            smallest_change(recipe, architecture, available) or "none of a recipe's: use more devices"
        )
    return TrainingPlan(
        parameters=counts,
        memory=memory,
        available_bytes=available,
        flops_per_step=flops,
        padded_tokens_per_step=recipe.train.global_batch_size * recipe.data.seq_length,
        num_devices=recipe.num_processes,
        expected_step_time_s=None if rate is None else flops / rate,
        checkpoint_bytes=checkpoint_bytes(recipe, architecture),
        suggestion=suggestion,
    )


def require_fit(plan: TrainingPlan, recipe: Recipe) -> None:
    """Refuse a plan that cannot fit.

    Raises:
        ConfigError: it names the memory, and the smallest change that fits.
    """
    if not plan.fits:
        raise ConfigError(
            "the run does not fit into device memory", where=f"recipe {recipe.name}",
            expected=f"at most {plan.available_bytes / GIB:.0f} GiB a device",
            got=f"{plan.memory.total / GIB:.1f} GiB by the plan", fix=plan.suggestion or "",
        )  # fmt: skip


def smallest_change(recipe: Recipe, architecture: Architecture, available_bytes: float) -> str | None:
    """The first change that fits, mildest first: single changes, then pairs, then threes."""
    applicable = [(label, section) for label, change in CHANGES if (section := change(recipe)) is not None]
    for size in (1, 2, 3):
        for chosen in combinations(applicable, size):
            changed = _apply(recipe, architecture, [section for _, section in chosen])
            if changed is not None and estimate_memory(changed, architecture).total <= available_bytes:
                return " and ".join(label for label, _ in chosen)
    return None


def _apply(
    recipe: Recipe, architecture: Architecture, sections: list[dict[str, dict[str, Any]]]
) -> Recipe | None:
    """The changed recipe; None when it breaks a rule that the recipe keeps."""
    data = recipe.model_dump(mode="json")
    for section in sections:
        for name, values in section.items():
            data[name] |= values
    try:
        changed = parse_recipe(data, where="a change to the recipe")
    except ConfigError:  # the change does not divide: it is no candidate
        return None
    broken = {problem.rule for problem in check_layout(architecture, recipe)}
    return None if {problem.rule for problem in check_layout(architecture, changed)} - broken else changed


def _if(condition: bool, section: str, **values: Any) -> dict[str, dict[str, Any]] | None:
    return {section: values} if condition else None


def _tensor_parallel(size: int) -> Callable[[Recipe], dict[str, dict[str, Any]] | None]:
    return lambda recipe: _if(
        recipe.parallel.tensor_model_parallel_size < size <= recipe.num_processes and _is_megatron(recipe),
        "parallel", tensor_model_parallel_size=size, sequence_parallel=True,
    )  # fmt: skip


def _is_megatron(recipe: Recipe) -> bool:
    return recipe.train.engine == "megatron"


CHANGES: tuple[Change, ...] = (
    ("optimizer.use_distributed_optimizer = true", lambda r: _if(
        not r.optimizer.use_distributed_optimizer and _is_megatron(r), "optimizer", use_distributed_optimizer=True)),
    ('precision.recompute = "selective"', lambda r: _if(
        r.precision.recompute == "none" and _is_megatron(r), "precision", recompute="selective")),
    ("optimizer.use_precision_aware_optimizer = true", lambda r: _if(
        not r.optimizer.use_precision_aware_optimizer and r.precision.dtype == "bf16" and _is_megatron(r),
        "optimizer", use_precision_aware_optimizer=True, use_distributed_optimizer=True)),
    ("train.micro_batch_size = 1", lambda r: _if(r.train.micro_batch_size > 1, "train", micro_batch_size=1)),
    ("precision.recompute_vision = true", lambda r: _if(
        not r.precision.recompute_vision and _is_megatron(r), "precision", recompute_vision=True)),
    ('precision.recompute = "full"', lambda r: _if(
        r.precision.recompute != "full", "precision", recompute="full", recompute_num_layers=1)),
    ("parallel.tensor_model_parallel_size = 2 with sequence_parallel = true", _tensor_parallel(2)),
    ("parallel.tensor_model_parallel_size = 4 with sequence_parallel = true", _tensor_parallel(4)),
    ("parallel.tensor_model_parallel_size = 8 with sequence_parallel = true", _tensor_parallel(8)),
    ("optimizer.cpu_offload_fraction = 0.5", lambda r: _if(
        r.optimizer.cpu_offload_fraction < 0.5 and _is_megatron(r) and r.precision.dtype != "fp32", "optimizer",
        cpu_offload_fraction=0.5, use_distributed_optimizer=True)),
    ("optimizer.cpu_offload_fraction = 1.0", lambda r: _if(
        r.optimizer.cpu_offload_fraction < 1.0 and (r.precision.dtype != "fp32" or not _is_megatron(r)), "optimizer",
        cpu_offload_fraction=1.0, use_distributed_optimizer=True)),
)  # fmt: skip
"""Changes to try, mildest first: what costs no speed, then a little, then much."""
