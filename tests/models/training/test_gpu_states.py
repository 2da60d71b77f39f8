# SPDX-License-Identifier: Apache-2.0
"""Optimizer states on the CPU, in 16 bits, and in checkpoints that are written beside the next steps, on real GPUs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.contract.compat_train import recipe_toml
from models.contract.recipe import Recipe
from models.contract.site import Site
from models.parity.jobs import make_jobs
from models.training import optimizer as optimizers
from models.training.adamw_steps import step_short_states, step_whole_states
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import stop_distributed
from tests.models.training.engines import make_engine

pytestmark = pytest.mark.gpu

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
NUM_STEPS = 8
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
HALF, WHOLE = {"cpu_offload_fraction": 0.5}, {"cpu_offload_fraction": 1.0}
PRECISION_AWARE = {"use_precision_aware_optimizer": True}
OPTIMIZER = {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 0}


@pytest.fixture(autouse=True)
def visible_gpus(one_plain_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests beside these hide the GPUs; those that the session was given are seen."""
    if VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


def steps(recipe: Recipe) -> tuple[MegatronEngine, list[float]]:
    """An engine after some steps on one batch, and the loss of each."""
    [job] = make_jobs("qwen3_vl", {"one": {}}, cases=("mixed", "text"), device="cuda")
    try:
        engine = make_engine(recipe, job)
        losses = []
        for _ in range(NUM_STEPS):
            batches = list(job.batches[0])
            denominator = sum(batch.num_supervised_tokens for batch in batches)
            padded = sum(batch.input_ids.numel() for batch in batches)
            sums = engine.forward_backward(batches, denominator=denominator, num_padded_tokens=padded)
            assert engine.update().is_updated
            losses.append(sums.loss / sums.denominator)
        return engine, losses
    finally:
        stop_distributed()


@pytest.mark.parametrize(
    ("states", "share", "tolerance"),
    [
        pytest.param(HALF, 0.5, 2e-3, id="half offloaded"),
        pytest.param(WHOLE, 1.0, 2e-3, id="offloaded"),
        pytest.param(PRECISION_AWARE, 0.0, 1e-2, id="precision-aware"),
        pytest.param(PRECISION_AWARE | HALF, 0.5, 2e-3, id="precision-aware and half offloaded"),
    ],
)
def test_states_elsewhere_step_as_on_the_device(
    states: dict[str, Any], share: float, tolerance: float, make_recipe: MakeRecipe
) -> None:
    plain = make_recipe(precision={"dtype": "bf16"}, optimizer=OPTIMIZER)
    _, expected = steps(plain)
    engine, losses = steps(make_recipe(precision={"dtype": "bf16"}, optimizer=OPTIMIZER | states))
    print(states, [f"{loss / other - 1:.1e}" for loss, other in zip(losses, expected, strict=True)])  # noqa: T201 - the record
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < 0.9 * losses[0]
    [part] = engine.optimizer.chained_optimizers
    if share:
        offloaded = [
            p
            for inner in part.optimizer.cpu_optimizers
            for group in inner.param_groups
            for p in group["params"]
        ]
        assert {p.device.type for p in offloaded} == {"cpu"}
        total = sum(p.numel() for p in engine.modules[0].parameters())
        assert sum(p.numel() for p in offloaded) / total == pytest.approx(share, abs=0.25)
        assert all(p.numel() == 0 or p.dtype == torch.bfloat16 for p in part.get_parameters())
    else:
        moments = {value.dtype for state in part.optimizer.state.values() for value in state.values()}
        assert torch.bfloat16 in moments


def stepped_states(*, is_own: bool) -> list[torch.Tensor]:
    """fp32 weights and moments after some steps of TransformerEngine's AdamW, on its own step or on ours."""
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(1)
    weights: list[Any] = [
        torch.randn(size, generator=generator).bfloat16().cuda()
        for size in ((3, 5), (64, 128), (1,), (70001,))
    ]
    moments = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    optimizer = FusedAdam(
        weights, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1,
        master_weights=True, use_decoupled_grad=True, store_param_remainders=True, **moments,
    )  # fmt: skip
    if not is_own:
        step_short_states(optimizer)
    for _ in range(NUM_STEPS):
        for weight in weights:
            weight.decoupled_grad = torch.randn(weight.shape, generator=generator).cuda()
        optimizer.step()
    found = []
    for weight in weights:
        state = optimizer.state[weight]
        bits = (weight.view(torch.int16).long() << 16) + state["master_param"].long()
        found += [
            bits.to(torch.int32).view(torch.float32),
            state["exp_avg"].float(),
            state["exp_avg_sq"].float(),
        ]
    return found


def test_short_states_step_as_transformer_engine_steps_them() -> None:
    pytest.importorskip("transformer_engine")
    found, expected = stepped_states(is_own=False), stepped_states(is_own=True)
    for ours, theirs in zip(found, expected, strict=True):
        # A moment may round the other way, which the steps after it carry on.
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
def test_whole_states_step_as_transformer_engine_steps_them(model: torch.dtype) -> None:
    module = pytest.importorskip("transformer_engine.pytorch.optimizers")
    found = []
    for is_own in (True, False):
        generator = torch.Generator().manual_seed(1)
        sizes = ((3, 5), (64, 128), (1,), (70001,))
        weights = [torch.randn(size, generator=generator).to("cuda", model) for size in sizes]
        mains = [weight.float() for weight in weights]
        optimizer: Any = module.FusedAdam(mains, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        if not is_own:
            part = SimpleNamespace(
                optimizer=optimizer, shard_fp32_from_float16_groups=[mains], shard_float16_groups=[weights]
            )
            step_whole_states(part)
        for _ in range(NUM_STEPS):
            for main in mains:
                main.grad = torch.randn(main.shape, generator=generator).cuda() * (0.25 if is_own else 1.0)
            optimizer.gradient_scale = 0.25
            optimizer.step()
        found.append([*mains, *(state for main in mains for state in optimizer.state[main].values())])
        assert is_own or all(torch.equal(w, m.to(model)) for w, m in zip(weights, mains, strict=True))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_with_whole_states_in_one_launch_is_as_with_many(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformer_engine")
    recipe = make_recipe(precision={"dtype": "bf16"}, optimizer=OPTIMIZER)
    engine, losses = steps(recipe)
    assert all(part.optimizer.gradient_scale == 1.0 for part in engine.optimizer.chained_optimizers)
    monkeypatch.setattr(optimizers, "_is_fused_adam", lambda inner: False)
    _, expected = steps(recipe)
    print([f"{loss / other - 1:.1e}" for loss, other in zip(losses, expected, strict=True)])  # noqa: T201 - the record
    assert losses == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("engine", "num_processes", "states", "precision", "is_async"),
    [
        pytest.param("megatron", 1, HALF, {}, True, id="megatron-half-async"),
        pytest.param("megatron", 1, PRECISION_AWARE, {}, False, id="megatron-precision-aware"),
        pytest.param("megatron", 1, {}, {"fp8": "tensorwise"}, False, id="megatron-fp8"),
        pytest.param(
            "megatron", 1, {}, {"fp8": "tensorwise", "recompute": "selective"}, True, id="megatron-fp8-async"
        ),
        pytest.param("megatron", 2, WHOLE, {}, False, id="megatron-dp2-offloaded"),
        pytest.param("fsdp2", 2, {}, {}, True, id="fsdp2-dp2-async"),
        pytest.param("fsdp2", 2, WHOLE, {}, True, id="fsdp2-dp2-offloaded-async"),
    ],
)
def test_run_that_goes_on_equals_the_whole_one(
    engine: str, num_processes: int, states: dict[str, Any], precision: dict[str, Any], *, is_async: bool, site: Site,
    make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows,
) -> None:  # fmt: skip
    if torch.cuda.device_count() < num_processes:
        pytest.skip(f"needs {num_processes} GPUs")
    recipe = make_recipe(
        num_processes,
        model={"checkpoint": str(aligned(site)), "init": "random"},
        data={"padding": "max_length"},
        train={"engine": engine, "eval_interval": 2, "eval_samples": 4},
        precision={"dtype": "bf16"} | precision,
        optimizer=OPTIMIZER | states,
        checkpoint={"save_interval": 2, "async_save": is_async, "resharding": "data"},
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with launch(recipe, site, whole) as beside:  # starting takes longer than training
        for options in (("--stop-after", "4"), ("--resume",)):
            assert launch(recipe, site, cut, *options).wait() == 0, said(cut)
    assert beside.returncode == 0, said(whole)
    assert rows_of(cut) == rows_of(whole)


def aligned(site: Site) -> Path:
    """The tiny checkpoint's config and tokenizer with an MLP as wide as fp8 takes it."""
    folder = Path(site.checkpoints) / "aligned-qwen2_5_vl"
    if not folder.exists():
        shutil.copytree(Path(site.checkpoints) / "tiny-qwen2_5_vl", folder)
        config = json.loads((folder / "config.json").read_text())
        config.get("text_config", config)["intermediate_size"] = 192
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def launch(recipe: Recipe, site: Site, run: Path, *options: str) -> subprocess.Popen[bytes]:
    """Train with torchrun: forks of one process, as in the tests beside these, must not share a GPU's libraries."""
    recipe_file, site_file = run.with_suffix(".toml"), run.with_suffix(".site.toml")
    recipe_file.write_text(recipe_toml(recipe))
    site_file.write_text("".join(f'{name} = "{value}"\n' for name, value in site.model_dump().items()))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(recipe.num_processes),
        "-m", "models.entry.train", "--recipe", str(recipe_file), "--run-dir", str(run), "--site", str(site_file),
    ]  # fmt: skip
    with output(run).open("a") as file:
        return subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT)


def output(run: Path) -> Path:
    """What trainings of a run directory said."""
    return run.with_suffix(".out")


def said(run: Path) -> str:
    """The end of it."""
    return output(run).read_text()[-3000:]
