# SPDX-License-Identifier: Apache-2.0
"""Parallel layouts on gloo against transformers on one process: loss and every gradient, on every rank."""

from pathlib import Path
from typing import Any

import pytest

from models.parity.jobs import make_jobs, run_jobs

TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
UNEVEN = PP | {"num_layers_in_first_pipeline_stage": 1}
CP: dict[str, Any] = {"context_parallel_size": 2}
DP: dict[str, Any] = {"num_dp": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2, "num_dp": 2, "moe_token_dispatcher_type": "alltoall"}
GATHER: dict[str, Any] = {"moe_token_dispatcher_type": "allgather"}
FULL: dict[str, Any] = {"recompute": "full", "recompute_vision": True}

DENSE = {
    "tp": TP,
    "tp sp": SP,
    "pp": PP,
    "pp 1+3": UNEVEN,
    "pp 1+3 recompute": UNEVEN | FULL,
    "cp": CP,
    "dp": DP,
}
EXPERTS = {
    "tp sp": SP,
    "tp sp ep": SP
    | {
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "moe_token_dispatcher_type": "alltoall",
    },
    "ep": EP,
    "tp sp etp": SP
    | {"expert_tensor_parallel_size": 2},  # parts of different sizes, which gloo cannot gather itself
    "etp dp": DP | {"expert_tensor_parallel_size": 2},
    "tp sp ep gather": SP | GATHER | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "tp sp etp gather": SP | GATHER | {"expert_tensor_parallel_size": 2},
}
CASES = ("mixed", "text", "images", "video")
AUDIO = ("audio and vision", "text", "audios", "image")

# Worst measured on two processes: loss 5e-8, gradients 4e-6.
LOSS, GRADIENT = 1e-5, 1e-3


def check(
    model: str,
    layouts: dict[str, dict[str, Any]],
    folder: Path,
    *,
    cases: tuple[str, ...] = CASES,
    num_processes: int = 2,
    packed: bool = False,
    multiple: int = 8,
) -> None:
    jobs = make_jobs(model, layouts, cases=cases, packed=packed, multiple=multiple)
    results = run_jobs(jobs, num_processes=num_processes, folder=folder)
    assert [result["name"] for result in results] == list(layouts)
    for result in results:
        assert result["loss_error"] < LOSS, result
        assert result["gradient_error"] < GRADIENT, result
        assert not result["missing"], result


@pytest.mark.slow  # by default trained: tests/models/training/test_layouts.py
def test_deepstack_travels_and_sequence_parallel_agrees(tmp_path: Path) -> None:
    check("qwen3_vl", {"tp sp": SP, "pp 1+3": UNEVEN}, tmp_path, cases=("mixed", "text"))


@pytest.mark.slow
def test_dense_layouts_agree(tmp_path: Path) -> None:
    check("qwen3_vl", DENSE, tmp_path)


@pytest.mark.slow
def test_windowed_vision_layouts_agree(tmp_path: Path) -> None:
    virtual = PP | {"virtual_pipeline_model_parallel_size": 2, "variable_seq_lengths": False}
    check("qwen2_5_vl", {"tp sp": SP, "pp 1+3": UNEVEN, "cp": CP}, tmp_path)
    check("qwen2_5_vl", {"vpp": virtual}, tmp_path, cases=("image", "image"))


@pytest.mark.slow
def test_expert_layouts_agree(tmp_path: Path) -> None:
    check("qwen3_vl_moe", EXPERTS | {"pp 1+3": UNEVEN, "cp": CP}, tmp_path)


@pytest.mark.slow
def test_audio_layouts_agree(tmp_path: Path) -> None:
    check("qwen3_omni", {"tp sp": SP, "pp 1+3": UNEVEN, "cp": CP, "ep": EP}, tmp_path, cases=AUDIO)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3_vl", "qwen2_5_vl"])
def test_packed_layouts_agree(model: str, tmp_path: Path) -> None:
    check(model, {"tp sp": SP, "pp 1+3": UNEVEN, "cp": CP, "dp": DP}, tmp_path, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3_vl", "qwen3_omni"])
def test_packs_with_samples_of_one_token_and_media_at_the_end_agree(model: str, tmp_path: Path) -> None:
    cases = (
        "one token",
        "media at the end",
        *(("audio at the end", "text") if model == "qwen3_omni" else ()),
    )
    check(model, {"pp 1+3": UNEVEN, "dp": DP}, tmp_path, cases=cases, packed=True, multiple=1)
    # as many tokens a sample as context parallelism needs, and no more
    check(model, {"tp sp": SP, "cp": CP}, tmp_path, cases=cases, packed=True, multiple=4)


@pytest.mark.slow
def test_four_processes_agree(tmp_path: Path) -> None:
    layouts = {
        "tp sp cp": SP | CP,
        "tp sp pp": SP | UNEVEN,
        "cp pp": CP | UNEVEN,
        "cp dp": CP | DP,
        "pp dp": UNEVEN | DP,
    }
    check("qwen3_vl", layouts, tmp_path, num_processes=4)
    check("qwen3_vl", {"tp sp cp": SP | CP}, tmp_path, num_processes=4, packed=True)
