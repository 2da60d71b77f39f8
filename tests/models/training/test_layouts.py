# SPDX-License-Identifier: Apache-2.0
"""Training under a parallel layout is training: losses, gradient norms and held-out losses are those of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.contract.recipe import Recipe
from models.contract.record import iter_metrics
from models.contract.site import Site
from models.training.progress import TrainOptions
from models.training.start import train
from tests.models.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}), "dp2-overlap": (2, OVERLAP), "tp2": (2, TP), "tp2sp": (2, SP), "pp2": (2, PP), "cp2": (2, CP),
    "cp2-dp2": (4, CP), "cp2-pp2": (4, CP | PP), "cp2-tp2sp": (4, CP | SP),
}  # fmt: skip
EXPERT_LAYOUTS = {"ep2": (2, EP), "ep2-cp2": (4, EP | CP), "ep2-tp2sp": (4, EP | SP)}
MODELS: dict[str, dict[str, str]] = {
    "qwen2_5_vl": {"family": "qwen2_5_vl", "checkpoint": "tiny-qwen2_5_vl"},
    "qwen3_vl": {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl"},
    "qwen3_vl_moe": {"family": "qwen3_vl", "checkpoint": "tiny-qwen3_vl_moe"},
    "qwen3_omni": {"family": "qwen3_omni", "checkpoint": "tiny-qwen3_omni"},
}
EXPERTS = ("qwen3_vl_moe", "qwen3_omni")
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "rows": {"train": {"eval_interval": 2, "eval_samples": 8}},
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
QUICK = {("qwen2_5_vl", "cp2", "rows"), ("qwen3_vl", "cp2", "packed")}
"""Of the default run."""
MATRIX = [
    pytest.param(model, layout, form, marks=() if (model, layout, form) in QUICK else pytest.mark.slow)
    for model in MODELS
    for layout in (*LAYOUTS, *(EXPERT_LAYOUTS if model in EXPERTS else ()))
    for form in FORMS
]
COLUMNS = ("lm_loss", "grad_norm", "eval_lm_loss", "num_supervised_tokens", "num_real_tokens", "num_images")


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
    num_processes, parallel = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    sections = {"model": MODELS[model], **FORMS[form]}
    if model == "qwen3_omni":
        sections["data"] = {"dataset": "scenes-audio", "seq_length": 256} | sections.get("data", {})
    alone = make_recipe(**sections)
    train(alone, all_families, tmp_path / "alone", TrainOptions(stop_after=4))
    together = make_recipe(num_processes, parallel=parallel, **sections)
    trainer.run(together, tmp_path / "together", "--stop-after", "4")
    ours, theirs = (list(iter_metrics(tmp_path / name)) for name in ("together", "alone"))
    assert [row["sample_digest"] for row in ours] == [row["sample_digest"] for row in theirs]
    for column in COLUMNS:
        values = [[row[column] for row in rows if row[column] is not None] for rows in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=2e-5, err_msg=column)
