# SPDX-License-Identifier: Apache-2.0
"""What an update does to gradients: a mean of sums, clipped by the norm over the whole model."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from models.contract.recipe import Recipe
from models.parity.compare import gradient_norm
from models.parity.jobs import make_jobs
from models.training.cpu import cpu_megatron
from models.training.gradients import scale_gradients
from models.training.parallel import stop_distributed
from tests.models.training.engines import make_engine


def part(*values: float, clip_grad: float = 1.0, is_stub: bool = False) -> SimpleNamespace:
    """A part of an optimizer with one parameter for each value of a gradient."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor([value])
    settings = {"clip_grad": clip_grad, "use_precision_aware_optimizer_no_fp8_or_ds_fp8": False}
    return SimpleNamespace(
        is_stub_optimizer=is_stub, config=SimpleNamespace(**settings), get_parameters=lambda: parameters
    )


@pytest.mark.parametrize(
    ("norm", "clip_grad", "expected"),
    [(0.5, 1.0, 0.25), (2.0, 1.0, 0.125), (2.0, 4.0, 0.25), (2.0, 0.0, 0.25), (1.0, 1.0, 0.25)],
)
def test_gradients_are_scaled_and_clipped_together(norm: float, clip_grad: float, expected: float) -> None:
    parts = [part(4.0, -8.0, clip_grad=clip_grad), part(16.0, clip_grad=clip_grad), part(is_stub=True)]
    scale_gradients(SimpleNamespace(chained_optimizers=parts), 0.25, norm)
    found = [float(p.grad) for found in parts for p in found.get_parameters()]
    assert found == pytest.approx([4.0 * expected, -8.0 * expected, 16.0 * expected], rel=1e-5)


def test_optimizer_that_scales_in_its_step_is_told_how() -> None:
    apart = part(4.0)
    apart.optimizer = SimpleNamespace(gradient_scale=1.0)
    parts = [apart, part(16.0)]
    scale_gradients(SimpleNamespace(chained_optimizers=parts), 0.25, 2.0)
    assert apart.optimizer.gradient_scale == pytest.approx(0.125, rel=1e-5)
    assert [float(p.grad) for found in parts for p in found.get_parameters()] == pytest.approx(
        [4.0, 2.0], rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_norm_is_that_of_the_mean_loss_of_transformers(
    dtype: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(precision={"dtype": dtype})
    [job] = make_jobs("qwen3_vl", {"one": {}}, cases=("mixed", "text"))
    batches = list(job.batches[0])
    with cpu_megatron():
        engine = make_engine(recipe, job)
        denominator = sum(batch.num_supervised_tokens for batch in batches)
        num_padded_tokens = sum(batch.input_ids.numel() for batch in batches)
        engine.forward_backward(batches, denominator=denominator, num_padded_tokens=num_padded_tokens)
        found = engine.update()
        stop_distributed()
    assert found.is_updated
    assert found.grad_norm == pytest.approx(
        gradient_norm(job.gradients), rel=1e-5 if dtype == "fp32" else 2e-2
    )


def test_a_model_without_experts_counts_no_load_that_another_left_behind(
    make_recipe: Callable[..., Recipe],
) -> None:
    [job] = make_jobs("qwen3_vl", {"one": {}}, cases=("text",))
    batches = list(job.batches[0])
    with cpu_megatron():
        engine = make_engine(make_recipe(), job)
        get_moe_metrics_tracker().ensure_initialized("load_balancing_loss", 4, device="cpu")
        sums = engine.forward_backward(batches, denominator=1.0, num_padded_tokens=1)
        stop_distributed()
    assert sums.auxiliary == {}
