# SPDX-License-Identifier: Apache-2.0
"""Whole runs in one process: what they leave behind, how they end, and how they go on."""

import gc
import itertools
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.contract.errors import ConfigError, RunError
from models.contract.families import published_architecture
from models.contract.launcher import read_launcher_environment
from models.contract.memory import estimate_memory
from models.contract.recipe import Recipe
from models.contract.record import read_run_info
from models.contract.site import Site
from models.training import start
from models.training.checkpoint import FOLDER, TRACKER_FILE
from models.training.environment import describe_kernels
from models.training.progress import TrainOptions
from models.training.start import train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
PLAIN = TrainOptions()
RESUME = TrainOptions(is_resume=True)


def test_train_leaves_a_complete_run_directory(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(train={"train_iters": 4, "eval_interval": 2, "eval_samples": 4})
    assert train(recipe, site, tmp_path / "run", PLAIN) == "completed"
    info = read_run_info(tmp_path / "run")
    assert (info.outcome.status, info.outcome.iteration, info.outcome.error) == ("completed", 4, None)
    assert info.recipe_sha == recipe.sha()
    assert (
        info.num_parameters["total"] == info.num_parameters["trainable"] > info.num_parameters["vision"] > 0
    )
    assert info.sample_counts == {"consumed": 16, "skipped": 0}
    assert "cuda_device_literals" in info.environment["patches"]
    assert info.environment["kernels"] == "torch"
    rows = rows_of(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert [row["eval_lm_loss"] is not None for row in rows] == [False, True, False, True]
    assert all(
        row["num_supervised_tokens"] < row["num_real_tokens"] <= row["num_padded_tokens"] for row in rows
    )
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert len(log) == 4
    assert " iteration        4/       4 | consumed samples:           16 | " in log[-1]


def test_train_refuses_a_directory_that_holds_a_run(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(train={"train_iters": 1}, optimizer={"lr_warmup_iters": 0})
    train(recipe, site, tmp_path / "run", PLAIN)
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(recipe, site, tmp_path / "run", PLAIN)
    assert (tmp_path / "run" / "run.json").read_text() == before


@pytest.mark.parametrize(
    ("engine", "checkpoint"),
    [
        pytest.param("megatron", {"resharding": "data"}, id="megatron-data"),
        pytest.param("megatron", {"resharding": "any"}, id="megatron-any", marks=pytest.mark.slow),
        pytest.param(
            "megatron", {"resharding": "any", "async_save": True}, id="megatron-async", marks=pytest.mark.slow
        ),
        pytest.param("fsdp2", {}, id="fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2", {"async_save": True}, id="fsdp2-async", marks=pytest.mark.slow),
    ],
)
def test_resume_repeats_the_uninterrupted_run_to_the_bit(
    engine: str,
    checkpoint: dict[str, Any],
    site: Site,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    rows_of: Rows,
) -> None:
    recipe = make_recipe(
        train={"engine": engine}, checkpoint={"save_interval": 2, "keep_last": 1, **checkpoint}
    )
    train(recipe, site, tmp_path / "whole", PLAIN)
    assert train(recipe, site, tmp_path / "cut", TrainOptions(stop_after=3)) == "interrupted"
    assert train(recipe, site, tmp_path / "cut", RESUME) == "completed"
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    whole, cut = read_run_info(tmp_path / "whole"), read_run_info(tmp_path / "cut")
    assert cut.data_order_digest == whole.data_order_digest


def test_resume_forgets_rows_after_the_checkpoint_and_checks_that_they_come_again(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(checkpoint={"save_interval": 2})
    run = tmp_path / "run"
    train(recipe, site, run, TrainOptions(stop_after=4))
    (run / FOLDER / TRACKER_FILE).write_text("2\n")  # as if killed before the second checkpoint was published
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    altered = json.loads(lines[3]) | {"sample_digest": "0" * 16}
    metrics.write_text("\n".join([*lines[:3], json.dumps(altered)]) + "\n")
    with pytest.raises(RunError, match="sees other samples") as caught:
        train(recipe, site, run, RESUME)
    assert "iteration 4" in str(caught.value)
    assert [row["iteration"] for row in rows_of(run)] == [1, 2, 3]


def test_resume_refuses_a_checkpoint_of_another_recipe(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    train(make_recipe(checkpoint={"save_interval": 2}), site, tmp_path / "run", TrainOptions(stop_after=2))
    with pytest.raises(ConfigError, match="another recipe") as caught:
        train(make_recipe(optimizer={"lr": 2e-3}), site, tmp_path / "run", RESUME)
    assert "optimizer.lr: 0.001 in the checkpoint, 0.002 in the recipe" in str(caught.value)
    assert read_run_info(tmp_path / "run").outcome.status == "failed"


def test_failure_is_written_to_run_json(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint folder not found"):
        train(make_recipe(model={"checkpoint": "absent"}), site, tmp_path / "run", PLAIN)
    outcome = read_run_info(tmp_path / "run").outcome
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("rank 0: ConfigError: checkpoint folder not found")


def test_wrong_number_of_processes_is_refused(site: Site, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wrong number of processes"):
        train(make_recipe(num_processes=2), site, tmp_path / "run", PLAIN)


@pytest.mark.parametrize(
    ("checkpoint", "packing"),
    [
        pytest.param("qwen2_5_vl", False, id="qwen2_5_vl", marks=pytest.mark.slow),
        pytest.param("qwen3_omni", False, id="qwen3_omni"),
        pytest.param("qwen2_5_vl", True, id="qwen2_5_vl-packed", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", False, id="qwen3_vl", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", False, id="qwen3_vl_moe", marks=pytest.mark.slow),
        pytest.param("qwen3_omni", True, id="qwen3_omni-packed", marks=pytest.mark.slow),
    ],
)
def test_engines_agree_step_by_step(
    checkpoint: str, packing: bool, all_families: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    # Measured worst relative difference over six steps and all cases: 7e-8 in loss, 7e-7 in gradient norm, 3e-7 in the
    # load-balancing loss. A wrong denominator, a missing group without weight decay, a schedule that is one step off,
    # or padding that is counted as load shows from 1e-4 on.
    family = checkpoint.removesuffix("_moe")
    for engine in ("megatron", "fsdp2"):
        recipe = make_recipe(
            model={"family": family, "checkpoint": f"tiny-{checkpoint}"},
            data={
                "dataset": "scenes-audio" if family == "qwen3_omni" else "scenes", "packing": packing,
                "seq_length": 512 if packing else 256,
            },
            train={"engine": engine, "micro_batch_size": 1 if packing else 2},
        )  # fmt: skip
        train(recipe, all_families, tmp_path / engine, TrainOptions(stop_after=4))
    for a, b in zip(rows_of(tmp_path / "megatron"), rows_of(tmp_path / "fsdp2"), strict=True):
        assert a["sample_digest"] == b["sample_digest"]
        assert a["learning_rate"] == b["learning_rate"]
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-6)
        assert b["extra"] == pytest.approx(a["extra"], rel=5e-6)
        assert ("load_balancing_loss" in b["extra"]) == (checkpoint in ("qwen3_vl_moe", "qwen3_omni"))


@pytest.mark.parametrize("engine", ["megatron", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_the_logged_rate_is_the_schedules_where_every_group_has_a_multiplier(
    engine: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    # Frozen, the decoder has no parameters at the plain rate.
    for freeze in ([], ["language"]):
        recipe = make_recipe(
            model={"freeze": freeze},
            train={"engine": engine},
            optimizer={"vision_lr_mult": 0.1, "projector_lr_mult": 3.0},
        )
        train(recipe, site, tmp_path / str(len(freeze)), TrainOptions(stop_after=4))
    plain, frozen = ([row["learning_rate"] for row in rows_of(tmp_path / name)] for name in ("0", "1"))
    assert plain == frozen
    assert len(set(plain)) > 2


@pytest.mark.parametrize("engine", ["megatron", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_micro_batching_changes_no_number(
    engine: str, site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    # Four samples in one micro-batch or in four: the same sum over the same denominator. Measured: 3e-7.
    for size in (1, 4):
        recipe = make_recipe(
            train={"engine": engine, "micro_batch_size": size, "loss_reduction": "per_sample"}
        )
        train(recipe, site, tmp_path / str(size), TrainOptions(stop_after=3))
    for a, b in zip(rows_of(tmp_path / "1"), rows_of(tmp_path / "4"), strict=True):
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=3e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "is_async"),
    [
        pytest.param("megatron", True, marks=pytest.mark.slow),
        ("fsdp2", False),
        pytest.param("megatron", False, marks=pytest.mark.slow),
        pytest.param("fsdp2", True, marks=pytest.mark.slow),
    ],
)
def test_disk_full_keeps_the_checkpoint_before(
    engine: str, is_async: bool, site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(train={"engine": engine}, checkpoint={"save_interval": 2, "async_save": is_async})
    run = tmp_path / "run"
    train(recipe, site, run, TrainOptions(stop_after=2))
    previous, limits = (run / FOLDER / TRACKER_FILE).read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # a checkpoint is 7 MB
    try:
        with pytest.raises(RunError, match="checkpoint could not be written"):
            train(recipe, site, run, RESUME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / FOLDER / TRACKER_FILE).read_text() == previous == "2\n"
    assert [folder.name for folder in (run / FOLDER).iterdir() if folder.is_dir()] == ["iter_0000002"]
    assert train(recipe, site, run, RESUME) == "completed"


def test_settings_without_effect_on_a_cpu_are_refused(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    for key, value in (("cpu_offload_fraction", 0.5), ("use_precision_aware_optimizer", True)):
        with pytest.raises(ConfigError, match=key):
            train(make_recipe(optimizer={key: value}), site, tmp_path / key, PLAIN)


def test_bf16_trains(site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows) -> None:
    train(make_recipe(precision={"dtype": "bf16"}), site, tmp_path / "run", PLAIN)
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert {row["loss_scale"] for row in rows} == {1.0}


def test_fp16_skips_a_step_that_overflows_and_goes_on(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, rows_of: Rows
) -> None:
    recipe = make_recipe(precision={"dtype": "fp16"}, optimizer={"lr_warmup_iters": 0})
    assert train(recipe, site, tmp_path / "run", PLAIN) == "completed"
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss_scale"] == 65536.0
    for before, row in itertools.pairwise(rows):
        is_skipped = row["num_skipped_iterations"] == 1
        assert (row["grad_norm"] == "nan") == is_skipped
        assert (row["learning_rate"] == before["learning_rate"]) == is_skipped
    assert not any(row["num_nan_iterations"] for row in rows)


def test_what_does_not_fit_is_refused_before_the_model_is_built(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train={"train_iters": 1}, optimizer={"lr_warmup_iters": 0})
    monkeypatch.setattr(start, "pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(start, "device_memory_bytes", lambda _: 2**20)
    with monkeypatch.context() as patch:
        patch.setattr("models.training.megatron_engine.start_engine", lambda *_, **__: pytest.fail("built"))
        with pytest.raises(ConfigError, match="does not fit into device memory") as caught:
            train(recipe, site, tmp_path / "small", PLAIN)
    assert caught.value.got.endswith("GiB by the plan")
    assert train(recipe, site, tmp_path / "forced", TrainOptions(checks_memory=False)) == "completed"
    monkeypatch.setattr(start, "device_memory_bytes", lambda _: 2**40)
    assert train(recipe, site, tmp_path / "large", PLAIN) == "completed"


def test_the_kernels_are_on_record(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    auto = make_recipe(model={"attention_backend": "auto"})
    assert describe_kernels(auto, cpu) == "torch"
    assert describe_kernels(make_recipe(train={"engine": "fsdp2"}), gpu) == "transformers"
    assert not caplog.text
    is_installed = [False]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: is_installed[0] or None)
    assert describe_kernels(auto, gpu) == "torch, as transformer_engine is not installed"
    assert "torch's kernels take over" in caplog.text
    assert describe_kernels(make_recipe(model={"attention_backend": "torch"}), gpu) == "torch"
    is_installed[0] = True
    assert describe_kernels(auto, gpu) == "transformer_engine"
    grouped = make_recipe(model={"experts_backend": "grouped"})
    assert describe_kernels(grouped, gpu) == "transformer_engine, grouped experts"
    gather: dict[str, Any] = {"moe_token_dispatcher_type": "allgather"}
    assert describe_kernels(make_recipe(parallel=gather), cpu) == "torch"  # one rank has nothing to gather
    gathered = make_recipe(
        2, model={"experts_backend": "grouped"}, parallel=gather | {"expert_model_parallel_size": 2}
    )
    assert describe_kernels(gathered, gpu) == "transformer_engine, grouped experts, gathered tokens"


def test_model_is_built_when_everything_that_auto_stands_for_is_known(
    site: Site, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Recipe] = []

    def build(recipe: Recipe, *_: Any, **__: Any) -> None:
        built.append(recipe)
        raise RunError("seen")

    monkeypatch.setattr("models.training.megatron_engine.start_engine", build)
    with pytest.raises(RunError, match="seen"):
        train(make_recipe(), site, tmp_path / "run", PLAIN)
    [recipe] = built
    assert (recipe.model.experts_backend, recipe.parallel.moe_token_dispatcher_type) == ("te", "alltoall")


def test_memory_is_planned_for_the_kernels_that_will_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = published_architecture("qwen2_5_vl_7b")
    auto, torch_alone = (
        make_recipe(model={"attention_backend": name}, data={"seq_length": 8192}, precision={"dtype": "bf16"})
        for name in ("auto", "torch")
    )
    needed = estimate_memory(torch_alone, sizes).total
    assert estimate_memory(auto, sizes).total < needed - 2**20
    monkeypatch.setattr(start, "pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(start, "device_memory_bytes", lambda _: needed - 2**20)
    monkeypatch.setattr(start, "resolve_attention_backend", lambda *_: "te")
    start.require_memory(auto, sizes, read_launcher_environment())
    monkeypatch.setattr(start, "resolve_attention_backend", lambda *_: "torch")
    with pytest.raises(ConfigError, match="does not fit"):
        start.require_memory(auto, sizes, read_launcher_environment())


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """As in a program of its own: the tests have what they imported frozen."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize("is_frozen_before", [False, True])
def test_collections_meanwhile_do_not_walk_what_was_there(
    make_recipe: MakeRecipe, *, is_frozen_before: bool
) -> None:
    if is_frozen_before:
        gc.freeze()

    def stopped() -> None:
        with start._manual_gc(make_recipe()):
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 1000
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert gc.isenabled()
    assert (gc.get_freeze_count() > 0) == is_frozen_before
    with start._manual_gc(make_recipe(train={"manual_gc_interval": 0})):
        assert gc.isenabled()
