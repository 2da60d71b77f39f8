# SPDX-License-Identifier: Apache-2.0
"""The measuring itself: what is put wrong in a reference must show in the measure that is meant for it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import distributed

from models.contract.errors import RunError
from models.parity import layouts
from models.parity.jobs import make_jobs, run_jobs
from models.parity.layouts import Job, Result
from models.parity.matrix import LIMITS
from models.training.cpu import cpu_megatron


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.set_num_threads(1)
    with cpu_megatron():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def run_job(job: Job) -> Result:
    parallel_state.destroy_model_parallel()
    return layouts.run_job(job, layouts.start_groups(job.settings))


def job(**changes: Any) -> Job:
    [made] = make_jobs("qwen3_vl", {"one": {}}, cases=("image",), **changes)
    return made


def measured(result: Result) -> dict[str, float]:
    assert result.logits_error is not None
    return {"logits": result.logits_error, "loss": result.loss_error, "gradient": result.gradient_error,
            "gradient_norm": result.gradient_norm_error}  # fmt: skip


@pytest.mark.usefixtures("one_process")
def test_right_reference_agrees_and_each_wrong_one_shows() -> None:
    right = job()
    name = max(right.gradients, key=lambda key: float(right.gradients[key].norm()))
    logits = right.logits[0][0].clone()
    logits[0, 3] += 0.01 * logits.abs().max()  # one position of one micro-batch
    gradients = right.gradients | {name: right.gradients[name] * 1.1}
    wrong = {
        "logits": dataclasses.replace(right, logits=((logits,),)),
        "loss": dataclasses.replace(right, loss=right.loss * 1.0001),
        "gradient": dataclasses.replace(right, gradients=gradients),
    }
    assert all(value < LIMITS[measure] for measure, value in measured(run_job(right)).items())
    for measure, broken in wrong.items():
        found = measured(run_job(broken))
        shows = {key for key, value in found.items() if value >= LIMITS[key]}
        assert shows == ({"gradient", "gradient_norm"} if measure == "gradient" else {measure}), found


@pytest.mark.usefixtures("one_process")
def test_parameter_that_no_rank_compares_is_missing() -> None:
    right = job()
    more = dataclasses.replace(right, gradients=right.gradients | {"forgotten": torch.ones(2)})
    assert run_job(more).missing == ["forgotten"]


@pytest.mark.usefixtures("one_process")
def test_padding_of_a_packed_row_does_not_count() -> None:
    packed = job(packed=True, multiple=16)
    logits = packed.logits[0][0].clone()
    real = packed.batches[0][0].sample_lengths[0]
    assert real < logits.shape[1]
    logits[0, real:] = 1e6
    assert run_job(dataclasses.replace(packed, logits=((logits,),))).logits_error == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.slow
def test_what_ended_before_a_job_failed_is_kept(tmp_path: Path) -> None:
    right = job()
    broken = dataclasses.replace(right, name="broken", weights={})
    with pytest.raises(RunError, match="layout processes failed"):
        run_jobs([right, broken], num_processes=1, folder=tmp_path)
    [kept] = json.loads((tmp_path / "results.json").read_text())
    assert kept["name"] == "one"


def test_processes_that_take_too_long_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="stopped after 0 s"):
        run_jobs([job()], num_processes=1, folder=tmp_path, timeout_s=0.2)
