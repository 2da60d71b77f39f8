# SPDX-License-Identifier: Apache-2.0
"""Training under a parallel layout is training: losses, gradient norms and held-out losses are those of one process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.contract.recipe import Recipe
from models.contract.record import iter_metrics, read_run_info
from models.contract.site import Site
from models.training.progress import TrainOptions
from models.training.start import train
from tests.models.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"}
GATHER = EP | {"moe_token_dispatcher_type": "allgather"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}), "dp2-overlap": (2, OVERLAP), "tp2": (2, TP), "tp2sp": (2, SP), "pp2": (2, PP), "cp2": (2, CP),
    "cp2-dp2": (4, CP), "cp2-pp2": (4, CP | PP), "cp2-tp2sp": (4, CP | SP),
}  # fmt: skip
EXPERT_LAYOUTS = {"ep2": (2, EP), "ep2-cp2": (4, EP | CP), "ep2-tp2sp": (4, EP | SP)}
WITH_EXPERTS = [name for name in LAYOUTS | EXPERT_LAYOUTS if name != "tp2"]
"""Experts under tensor parallelism need sequence parallelism."""
CHOSEN_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2-vpp2": (2, PP | {"virtual_pipeline_model_parallel_size": 2}),
    "pp2-first1": (2, PP | {"num_layers_in_first_pipeline_stage": 1}),
    "pp2-last1": (2, PP | {"num_layers_in_last_pipeline_stage": 1}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "tp2sp-pp2-dp2": (8, SP | PP),
    "pp2-dp2-overlap": (4, PP | OVERLAP),
    "pp2-ep2": (4, PP | EP),
    "tp2sp-etp1": (2, SP | {"expert_tensor_parallel_size": 1}),
    "ep2-gather": (2, GATHER),
    "ep2-gather-tp2sp": (4, GATHER | SP),
    "cp2-ep2-etp2": (4, CP | EP | {"expert_tensor_parallel_size": 2}),
    "fsdp2-dp2": (2, {}),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"family": "qwen2_5_vl", "checkpoint": "tiny-qwen2_5_vl"},
    "qwen3_vl": {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl"},
    "qwen3_vl_moe": {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl_moe"},
    "qwen3_omni": {"family": "qwen3_omni", "checkpoint": "tiny-qwen3_omni"},
}
EXPERTS = ("qwen3_vl_moe", "qwen3_omni")
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "rows": {"train": {"eval_interval": 2, "eval_samples": 8}},
    # Equally long under every layout, so that experts are held to the same load: padding counts.
    "long-rows": {"data": {"padding": "max_length"}, "train": {"eval_interval": 2, "eval_samples": 8}},
    "many-rows": {
        "data": {"padding": "max_length"},
        "train": {"global_batch_size": 16},
        "optimizer": {"clip_grad": 0.1},
    },
    "recomputed": {"precision": {"recompute": "full", "recompute_vision": True}},
    "frozen-language": {
        "model": {"freeze": ["language"]},
        "optimizer": {"vision_lr_mult": 0.1, "projector_lr_mult": 3.0},
    },
    "frozen-vision": {"model": {"freeze": ["vision", "projector"]}},
    "rows-per-sample": {"train": {"loss_reduction": "per_sample"}},
    # Of stated shapes: a layout may align samples, and so pack others together.
    "packed": {
        "data": {
            "dataset": "fixed-shapes",
            "padding": "max_length",
            "packing": True,
            "seq_length": 256,
            "fixed_shapes": {"samples": 2, "images": 2, "image_size": 224},
        },
        "train": {"micro_batch_size": 1},
    },
}
QUICK = {
    ("qwen2_5_vl", "cp2", "rows"),
    ("qwen3_vl", "pp2-first1", "long-rows"),  # deepstack features travel
    ("qwen3_vl_moe", "ep2-gather", "long-rows"),
}
"""Of the default run."""
EVERYWHERE = ("rows", "rows-per-sample", "packed")
CHOSEN = [
    *(("qwen2_5_vl", "pp2-vpp2", form) for form in ("long-rows", "many-rows")),
    *((model, layout, "long-rows") for model in ("qwen2_5_vl", "qwen3_vl")
      for layout in ("pp2-first1", "pp2-last1", "pp4", "tp2sp-pp2-dp2")),
    *((model, layout, form) for model in EXPERTS
      for layout in ("pp2-ep2", "pp4", "tp2sp-etp1", "cp2-ep2-etp2") for form in ("long-rows", "many-rows")),
    *((model, layout, "many-rows") for model in EXPERTS for layout in ("cp2", "tp2sp")),
    *((model, layout, form) for model in EXPERTS for layout in ("ep2-gather", "ep2-gather-tp2sp")
      for form in ("long-rows", "packed")),
    *((model, layout, form) for model in ("qwen3_vl", "qwen3_omni") for layout in ("pp2", "cp2", "pp2-dp2-overlap")
      for form in ("recomputed", "frozen-language", "frozen-vision")),
    *((model, "fsdp2-dp2", form) for model in MODELS for form in ("rows", "frozen-vision")),
]  # fmt: skip
"""Combinations that meet somewhere in the code: not every layout with every form."""
MATRIX = [
    pytest.param(model, layout, form, marks=() if (model, layout, form) in QUICK else pytest.mark.slow)
    for model, layout, form in [
        *(
            (model, layout, form)
            for model in MODELS
            for layout in (WITH_EXPERTS if model in EXPERTS else LAYOUTS)
            for form in EVERYWHERE
        ),
        *CHOSEN,
    ]
]
COLUMNS = (
    "lm_loss", "grad_norm", "learning_rate", "eval_lm_loss", "num_supervised_tokens", "num_real_tokens", "num_images",
)  # fmt: skip


@pytest.mark.parametrize(("model", "layout", "form"), MATRIX)
def test_a_layout_trains_as_one_process_does(
    model: str,
    layout: str,
    form: str,
    all_families: Site,
    trainer: Trainer,
    make_recipe: MakeRecipe,
    tmp_path: Path,
) -> None:
    num_processes, parallel = (LAYOUTS | EXPERT_LAYOUTS | CHOSEN_LAYOUTS)[layout]
    sections = FORMS[form] | {"model": MODELS[model] | FORMS[form].get("model", {})}
    if layout.startswith("fsdp2"):
        sections["train"] = sections.get("train", {}) | {"engine": "fsdp2"}
    if model == "qwen3_omni":
        sections["data"] = {"dataset": "scenes-audio", "seq_length": 320} | sections.get("data", {})
    if model in EXPERTS and form != "packed":
        # The router's loss is a mean over padding too, and layouts align the longest row to other multiples.
        sections["data"] = sections.get("data", {}) | {"padding": "max_length"}
    alone = make_recipe(**sections)
    train(alone, all_families, tmp_path / "alone", TrainOptions(stop_after=4))
    together = make_recipe(num_processes, parallel=parallel, **sections)
    trainer.run(together, tmp_path / "together", "--stop-after", "4")
    ours, theirs = (list(iter_metrics(tmp_path / name)) for name in ("together", "alone"))
    assert [row["sample_digest"] for row in ours] == [row["sample_digest"] for row in theirs]
    for column in COLUMNS:
        values = [[row[column] for row in rows if row[column] is not None] for rows in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=2e-5, err_msg=column)
    if alone.data.padding == "max_length":
        for our_row, row in zip(ours, theirs, strict=True):
            assert our_row["extra"] == pytest.approx(row["extra"], rel=2e-5)
    ours, theirs = (read_run_info(tmp_path / name).num_parameters for name in ("together", "alone"))
    assert ours == theirs


@pytest.mark.slow
def test_tokens_of_more_experts_than_ranks_are_gathered_by_default(
    all_families: Site, trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Tiny models route a token to two experts: this one to four, on two ranks."""
    checkpoint = tmp_path / "four-experts-a-token"
    shutil.copytree(all_families.checkpoint("tiny-qwen3_vl_moe"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_experts_per_tok"] = 4
    (checkpoint / "config.json").write_text(json.dumps(config))
    model, data = {"family": "qwen3_vl", "checkpoint": str(checkpoint)}, {"padding": "max_length"}
    layouts = {"auto": {"expert_model_parallel_size": 2}, "alltoall": EP}
    for name, parallel in layouts.items():
        recipe = make_recipe(2, model=model, data=data, parallel=parallel)
        trainer.run(recipe, tmp_path / name, "--stop-after", "3")
    auto, alltoall = (read_run_info(tmp_path / name) for name in layouts)
    assert [run.environment["kernels"] for run in (auto, alltoall)] == ["torch, gathered tokens", "torch"]
    assert auto.recipe["parallel"]["moe_token_dispatcher_type"] == "auto"  # what was asked for
    assert auto.recipe_sha == alltoall.recipe_sha
    assert_alike(*(tmp_path / name for name in layouts))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [SP | {"expert_tensor_parallel_size": 1}, CP], ids=["tp2sp", "cp2"])
def test_ranks_with_the_same_rows_gather_tokens_whatever_the_lengths_of_others(
    layout: dict[str, Any], all_families: Site, trainer: Trainer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Rows are padded to the longest, and two data-parallel ranks have others: experts are not shared between them."""
    for parallel in (GATHER, EP):
        recipe = make_recipe(4, model=MODELS["qwen3_vl_moe"], parallel=parallel | layout)
        assert recipe.data.padding == "longest"
        trainer.run(recipe, tmp_path / parallel["moe_token_dispatcher_type"], "--stop-after", "3")
    kernels = read_run_info(tmp_path / "allgather").environment["kernels"]
    assert kernels == "torch, gathered tokens"
    assert_alike(*(tmp_path / name for name in ("allgather", "alltoall")))


def assert_alike(*runs: Path) -> None:
    """Losses and gradient norms of two runs."""
    found = [list(iter_metrics(run)) for run in runs]
    for column in COLUMNS[:2]:
        values = [[row[column] for row in rows] for rows in found]
        np.testing.assert_allclose(*values, rtol=2e-5, err_msg=column)
