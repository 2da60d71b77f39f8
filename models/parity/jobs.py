# SPDX-License-Identifier: Apache-2.0
"""Make jobs for :mod:`models.parity.layouts` from a transformers oracle, and start them."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.common.batch import Batch
from models.common.settings import ModelSettings
from models.contract.errors import RunError
from models.parity.cases import Case, make_case, pack, packed_positions
from models.parity.compare import Reference, run_oracle, to_megatron
from models.parity.layouts import Job
from models.parity.oracles import TINY, architecture_of, build_oracle, hf_config_of, named_tensors, rules_of


def make_jobs(
    model_name: str,
    layouts: dict[str, dict[str, Any]],
    *,
    cases: tuple[str, ...],
    multiple: int = 8,
    packed: bool = False,
    seed: int = 0,
    num_layers: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> list[Job]:
    """Jobs of one model: the same micro-batches under every layout.

    Args:
        model_name: A key of :data:`TINY`.
        layouts: Changes to :class:`ModelSettings` by job name.
        cases: Micro-batches, in order; they are dealt out to the data-parallel ranks, `num_dp` of the layout.
        multiple: Every row (packed: every sample) is padded to a multiple of this.
        packed: Pack the samples of every micro-batch into one row.
        seed: Of weights and micro-batches.
        num_layers: Decoder layers, where a layout needs more than the tiny models have.
        device: Where the layouts run; the reference is always computed on the CPU.
    """
    oracle = build_oracle(model_name, seed=seed, num_layers=num_layers)
    architecture = architecture_of(model_name, oracle)
    rules = rules_of(model_name, architecture)
    splits = TINY[model_name].splits_videos
    made = [
        make_case(case, oracle, splits_videos=splits, seed=seed + index, multiple=multiple)
        for index, case in enumerate(cases)
    ]
    references = [run_oracle(model_name, oracle, case, rules) for case in made]
    counts = [case.batch.num_supervised_tokens for case in made]
    loss = sum(reference.token_losses.sum().item() for reference in references) / sum(counts)
    gradients = {
        rule.key: sum(
            (
                reference.gradients[rule.key] * count
                for reference, count in zip(references, counts, strict=True)
            ),
            torch.zeros(()),
        )
        / sum(counts)
        for rule in rules
    }
    batches: list[Batch] = [pack(case.batch, multiple=multiple) if packed else case.batch for case in made]
    logits = [
        _laid_out(reference, case, packed, multiple) for reference, case in zip(references, made, strict=True)
    ]
    hf_config = hf_config_of(model_name, oracle)
    weights = to_megatron(named_tensors(model_name, dict(oracle.named_parameters())), rules)
    base = ModelSettings(moe_aux_loss_coeff=0.0, variable_seq_lengths=True, device=device)
    jobs = []
    for name, changes in layouts.items():
        changes = dict(changes)
        num_dp = changes.pop("num_dp", 1)
        jobs.append(
            Job(
                name=name,
                hf_config=hf_config,
                settings=dataclasses.replace(base, **changes),
                weights=weights,
                batches=tuple(tuple(batches[rank::num_dp]) for rank in range(num_dp)),
                loss=loss,
                gradients=gradients,
                logits=tuple(tuple(logits[rank::num_dp]) for rank in range(num_dp)),
            )
        )
    return jobs


def _laid_out(reference: Reference, case: Case, packed: bool, multiple: int) -> Tensor:
    if not packed:
        return reference.logits
    return reference.logits.flatten(0, 1)[packed_positions(case.batch, multiple=multiple)][None]


def run_jobs(
    jobs: list[Job], *, num_processes: int, folder: Path, timeout_s: float = 300
) -> list[dict[str, Any]]:
    """Run jobs on processes of this machine: gloo on the CPU, NCCL with one GPU each, as the jobs say.

    Args:
        jobs: What to run, all with the same number of processes.
        num_processes: How many.
        folder: For the jobs' and results' files.
        timeout_s: After which the processes are stopped.

    Returns: Fields of :class:`models.parity.layouts.Result`, one for every job.

    Raises:
        RunError: the processes failed or took too long; the end of their output is in the message. What they finished
            before is in `results.json` of the folder.
    """
    jobs_file, results_file = folder / "jobs.pt", folder / "results.json"
    torch.save(jobs, jobs_file)
    repository = Path(__file__).resolve().parents[2]
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(num_processes),
        ),
        *("-m", "models.parity.layouts", str(jobs_file), str(results_file)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if jobs[0].settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    what = "layout processes failed"
    # The launcher ends its ranks when it is asked to, not when it is killed.
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            what = f"layout processes were stopped after {timeout_s:.0f} s"
            process.terminate()
            said, _ = process.communicate()
    if process.returncode or not results_file.exists():
        raise RunError(what, where=" ".join(command), got=_what_ranks_said(said))
    return json.loads(results_file.read_text())


def _what_ranks_said(output: str) -> str:
    """The traceback of the rank that failed by itself, without the launcher's and those of ranks that lost it."""
    lines: dict[str, list[str]] = {}
    for line in output.splitlines():
        if found := re.match(r"\[(rank\d+)\]:(.*)", line):
            lines.setdefault(found[1], []).append(found[2])
    if not lines:
        return output.partition("failed (exitcode")[0][-4000:]
    causes = [rank for rank, said in lines.items() if "closed by peer" not in said[-1]]
    rank = min(causes or lines)
    return f"{rank}:\n" + "\n".join(lines[rank])[-4000:]
