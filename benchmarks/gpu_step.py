# SPDX-License-Identifier: Apache-2.0
"""Time training steps of published sizes on fixed shapes, beside a matrix-product ceiling measured in the same run.

    python -m benchmarks.gpu_step "--model qwen2_5_vl_7b --num-layers 8 --images 20" "--model qwen3_vl_8b"
    torchrun --nproc-per-node 8 -m benchmarks.gpu_step "--model qwen2_5_vl_7b --micro-batches 8"

Each argument is one case, run one after the other in the same process. Weights are random and the optimizer steps for
real. Rank 0 prints one JSON line a case; a case that fails prints its error and the next one runs.
"""

import argparse
import dataclasses
import gc
import json
import os
import shlex
import statistics
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.host_profile import host_profile
from models.common.batch import Batch
from models.common.settings import with_token_dispatcher
from models.contract.architecture import Architecture
from models.contract.errors import HarnessError
from models.contract.families import published_architecture
from models.contract.flops import megatron_flops, model_flops
from models.contract.launcher import read_launcher_environment
from models.contract.recipe import Recipe, parse_recipe
from models.datasets.fixed_shapes import RowShape, fixed_batch
from models.training.cpu import cpu_megatron
from models.training.device_rates import MatmulRate, matmul_rate
from models.training.kernel_profile import profiled, tables
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import Ranks, start_megatron, stop_distributed
from models.training.processes import pick_device

SUSTAINED_SECONDS = 8.0
"""After the first tenths of a second a GPU at its power limit lowers its clock: an H200 from 780 to 670 TFLOP/s."""


def make_recipe(options: argparse.Namespace, world_size: int, architecture: Architecture) -> Recipe:
    """Recipe of the benchmark: fixed shapes, one micro-batch row a process."""
    data_parallel = world_size // (options.tp * options.pp * options.cp)
    recipe = parse_recipe(
        {
            "name": "gpu-step",
            "num_processes": world_size,
            "model": {
                "family": architecture.family,
                "checkpoint": options.model,
                "init": "random",
                "attention_backend": options.backend,
                "experts_backend": options.experts,
            },
            "data": {
                "dataset": "fixed-shapes",
                "seq_length": options.seq_length,
                "packing": options.samples > 1,
                "fixed_shapes": {
                    "samples": options.samples,
                    "images": options.images,
                    "image_size": options.image_size,
                },
            },
            "train": {
                "train_iters": options.steps,
                "micro_batch_size": 1,
                "global_batch_size": options.micro_batches * data_parallel,
            },
            "optimizer": {
                "lr": 1e-5,
                "use_precision_aware_optimizer": options.precision_aware,
                "cpu_offload_fraction": options.offload,
            },
            "parallel": {
                "tensor_model_parallel_size": options.tp,
                "sequence_parallel": options.tp > 1,
                "pipeline_model_parallel_size": options.pp,
                "context_parallel_size": options.cp,
                "expert_model_parallel_size": options.ep,
                "moe_token_dispatcher_type": options.dispatcher,
                "overlap_grad_reduce": torch.cuda.is_available(),
                "overlap_param_gather": torch.cuda.is_available(),
            },
            "precision": {
                "dtype": "bf16" if torch.cuda.is_available() else "fp32",
                "grad_reduce_in_fp32": not options.bf16_grads,
                "recompute": options.recompute,
                **({"fp8": options.fp8} if options.fp8 else {}),
            },
        },
        where="benchmarks/gpu_step.py",
    )
    return with_token_dispatcher(recipe, architecture)


def one_step(engine: MegatronEngine, batches: list[Any], options: argparse.Namespace) -> None:
    """Forward and backward of all micro-batches, and the update unless it is left out."""
    denominator = sum(batch.num_supervised_tokens for batch in batches) * engine.ranks.dp_size
    num_padded_tokens = sum(batch.input_ids.numel() for batch in batches) * engine.ranks.dp_size
    engine.forward_backward(batches, denominator=denominator, num_padded_tokens=num_padded_tokens)
    if not options.no_update:
        engine.update()


def time_steps(engine: MegatronEngine, batches: list[Any], options: argparse.Namespace) -> list[float]:
    """Wall times of whole steps in ms, device synchronised around each."""
    times = []
    for _ in range(options.steps + options.warm_up):
        synchronize()
        start = time.perf_counter()
        one_step(engine, batches, options)
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times[options.warm_up :]


def synchronize() -> None:
    """Wait for the device, and for every rank."""
    if torch.cuda.is_available():
        distributed.barrier(device_ids=[torch.cuda.current_device()])
        torch.cuda.synchronize()
    else:
        distributed.barrier()


def profile_step(engine: MegatronEngine, batches: list[Any], options: argparse.Namespace) -> None:
    """Write what one step spends its device time on, and its CPU time; every rank steps, the first one writes."""
    is_first = engine.ranks.rank == 0
    if options.profile:
        with profiled(engine.ranks.device) as profiler:
            one_step(engine, batches, options)
        if is_first:
            Path(options.profile).write_text(tables(profiler, engine.ranks.device), encoding="utf-8")
    if options.host_profile:
        found = host_profile(lambda: one_step(engine, batches, options))
        if is_first:
            Path(options.host_profile).write_text(found, encoding="utf-8")


def summarise(
    options: argparse.Namespace,
    recipe: Recipe,
    architecture: Architecture,
    times: list[float],
    ceiling: MatmulRate | None,
) -> dict[str, Any]:
    """One row of the table."""
    step_time_ms = statistics.median(times)
    world_size, rows = recipe.num_processes, recipe.train.global_batch_size
    padded = megatron_flops(architecture.text, num_sequences=rows, seq_length=options.seq_length)
    side = options.image_size // architecture.vision.patch_size
    real = rows * model_flops(
        architecture,
        sample_lengths=[options.seq_length // options.samples] * options.samples,
        grid_thw=[(1, side, side)] * options.images,
    )
    rate = 1e-9 / step_time_ms / world_size
    return {
        **{key: value for key, value in vars(options).items() if value},
        "dispatcher": recipe.parallel.moe_token_dispatcher_type,
        "world_size": world_size,
        "step_time_ms": round(step_time_ms, 2),
        "spread_ms": round(max(times) - min(times), 2),
        "step_times_ms": [round(time) for time in times],
        "padded_tokens_per_second_per_gpu": round(
            rows * options.seq_length / step_time_ms * 1e3 / world_size, 1
        ),
        "megatron_tflops_per_gpu": round(padded * rate, 1),
        "model_tflops_per_gpu": round(real * rate, 1),
        **({} if ceiling is None else shares(real * rate, ceiling)),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def shares(model_tflops: float, ceiling: MatmulRate) -> dict[str, float]:
    """Model TFLOP/s beside what a dense product reaches: a cool device's at first, and for as long as a step takes."""
    return {
        "matmul_ceiling_tflops": round(ceiling.best_tflops, 1),
        "model_share_of_ceiling": round(model_tflops / ceiling.best_tflops, 4),
        "sustained_matmul_tflops": round(ceiling.median_tflops, 1),
        "model_share_of_sustained": round(model_tflops / ceiling.median_tflops, 4),
    }


def case_parser() -> argparse.ArgumentParser:
    """Options of one case."""
    parser = argparse.ArgumentParser(prog="case", add_help=False, exit_on_error=False)
    parser.add_argument(
        "--model", default="qwen2_5_vl_7b", help="published size, see models/contract/published"
    )
    parser.add_argument("--num-layers", type=int, default=0, help="keep the first decoder layers only")
    parser.add_argument("--vision-layers", type=int, default=0, help="keep the first vision layers only")
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=1, help="samples packed in a row")
    parser.add_argument("--images", type=int, default=0, help="images in a row")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--no-update", action="store_true", help="forward and backward only")
    parser.add_argument("--backend", default="auto", choices=["auto", "te", "torch"])
    parser.add_argument(
        "--experts", default="auto", choices=["auto", "te", "grouped"], help="whose products experts take"
    )
    parser.add_argument(
        "--dispatcher", default="auto", choices=["auto", "alltoall", "allgather"], help="of tokens to experts"
    )
    parser.add_argument("--fp8", default="", choices=["", "tensorwise", "blockwise", "delayed"])
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--bf16-grads", action="store_true", help="reduce gradients in bf16 instead of fp32")
    parser.add_argument("--precision-aware", action="store_true")
    parser.add_argument("--offload", type=float, default=0.0, help="share of optimizer states on the CPU")
    parser.add_argument("--profile", default="", help="write the profiler's table of one step to this file")
    parser.add_argument("--host-profile", default="", help="write Python's profile of one step to this file")
    for name in ("tp", "pp", "cp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    return parser


def cut_layers(architecture: Architecture, num_layers: int | None) -> Architecture:
    """The same model with only the first decoder layers; None and 0 leave it whole."""
    if not num_layers:
        return architecture
    text = dataclasses.replace(architecture.text, num_layers=num_layers)
    return dataclasses.replace(architecture, text=text)


def make_batches(options: argparse.Namespace, architecture: Architecture, ranks: Ranks) -> list[Batch]:
    """The micro-batches of one step on this data-parallel rank, as the command line describes them."""
    shape = RowShape(
        seq_length=options.seq_length, num_images=options.images, image_size=options.image_size,
        num_samples=options.samples,
    )  # fmt: skip
    return [
        fixed_batch(architecture, shape, seed=ranks.dp_rank * 1000 + index)
        for index in range(options.micro_batches)
    ]


def run_case(options: argparse.Namespace, ceiling: MatmulRate | None) -> None:
    """Build, time and take down one case; rank 0 prints the row, before a profile, which takes far longer."""
    architecture = published_architecture(options.model)
    if options.vision_layers:
        kept = tuple(i for i in architecture.vision.deepstack_visual_indexes if i < options.vision_layers)
        vision = dataclasses.replace(
            architecture.vision, num_layers=options.vision_layers, deepstack_visual_indexes=kept
        )
        architecture = dataclasses.replace(architecture, vision=vision)
    architecture = cut_layers(architecture, options.num_layers)
    launcher = read_launcher_environment()
    recipe = make_recipe(options, launcher.world_size, architecture)
    ranks = start_megatron(recipe, launcher, timeout_s=300)
    try:
        engine = MegatronEngine(recipe, architecture, ranks, ())
        engine.prepare()
        batches = make_batches(options, architecture, ranks)
        times = time_steps(engine, batches, options)
        if ranks.rank == 0:
            print(json.dumps(summarise(options, recipe, architecture, times, ceiling)), flush=True)
        profile_step(engine, batches, options)
    finally:
        stop_distributed()


def main() -> None:
    """Run every case of the command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(f"{__doc__}\n{case_parser().format_usage()}")
    cases = [case_parser().parse_args(shlex.split(argument)) for argument in sys.argv[1:]]
    patches = nullcontext() if torch.cuda.is_available() else cpu_megatron()
    with patches:
        device = pick_device(read_launcher_environment().local_rank)
        ceiling = None if device.type == "cpu" else matmul_rate(device, seconds=SUSTAINED_SECONDS)
        # Every case meets at a port of its own, where torchrun's store does not listen.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        for number, options in enumerate(cases):
            os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", "29500")) + 1)
            try:
                run_case(options, ceiling)
            except (RuntimeError, TypeError, ValueError, AssertionError, HarnessError) as error:
                traceback.print_exc()
                if int(os.environ.get("RANK", "0")) == 0:
                    said = f"{type(error).__name__}: {error}"[:300]
                    print(json.dumps({"case": sys.argv[number + 1], "error": said}), flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
