# SPDX-License-Identifier: Apache-2.0
"""The planted faults: what each is, and which gates may catch it.

A fault is caught when the verdict is one that no CI lets through and one of its named gates is red. Where it is
planted:

    model, data, training   a patch in a child process before it trains (patches.py)
    conversion              a checkpoint as a wrong converter would have written it (checkpoint_faults.py)
    measurement             a run directory as a wrong recorder would have left it (record_faults.py)
    speed                   a made-up record of a GPU run: no GPU is needed to slow one down (record_faults.py)
    machine                 what the launcher leaves beside such a record (machine_faults.py)
    baseline                the baseline's file, as a hand or a wrong look-up would give it (record_faults.py)
    inference               answers to held-out questions: one fine-tune with a patch, the rest in the files of
                            answers (inference_faults.py)
"""

from dataclasses import dataclass
from typing import Literal

Area = Literal[
    "model", "conversion", "data", "training", "measurement", "speed", "machine", "baseline", "inference"
]
STEPS = frozenset({"C1", "C2"})
END = frozenset({"C3"})
SOUND = frozenset({"C0"})
WORLD = frozenset({"C0", "plausibility"})
FILE = frozenset({"baseline"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One planted fault."""

    name: str
    area: Area
    what: str
    gates: frozenset[str]
    """Any of these must be red."""
    setup: str = "qwen3_vl"
    """What it is planted in: a row of SETUPS (training_jobs.py), `synthetic` or `colours`."""


def _faults(
    area: Area, gates: frozenset[str], rows: dict[str, str], setup: str = "qwen3_vl"
) -> tuple[Fault, ...]:
    return tuple(
        Fault(name=name, area=area, what=what, gates=gates, setup=setup) for name, what in rows.items()
    )


FAULTS: tuple[Fault, ...] = (
    *_faults(
        "model",
        STEPS,
        {
            "mrope_sections": "time, height and width sections of the rotary embedding move on by one",
            "mrope_layout": "contiguous rotary sections where the family interleaves them",
            "rope_theta": "rotary base 1e4 instead of the checkpoint's",
            "deepstack_off": "deepstack features are computed and never added",
            "deepstack_levels": "deepstack features are added in the wrong order",
            "causal_mask_off": "the decoder looks ahead",
            "vision_activation": "SiLU in the vision tower instead of GELU",
            "vision_rope": "rotary base 2 in the vision tower instead of 1e4",
            "position_table_off": "the learned position table of the vision tower is not added",
            "tied_weights": "logits come from weights of their own where the checkpoint ties them",
            "qk_norm_off": "queries and keys are not normalised",
            "merge_order": "vision tokens are written to their placeholders in reverse",
        },
    ),
    *_faults(
        "model",
        STEPS,
        {"window_off": "window layers of the vision tower see the whole frame"},
        setup="qwen2_5_vl",
    ),
    *_faults(
        "model",
        STEPS,
        {
            "router_scores": "sigmoid scores in the router instead of softmax",
            "router_topk": "one expert more is chosen",
        },
        setup="qwen3_vl_moe",
    ),
    *_faults(
        "conversion",
        STEPS,
        {
            "qkv_interleave": "query heads are laid out as if every head had its own group",
            "key_value_swap": "keys and values change places",
            "gate_up_swap": "gate and up projections change places",
            "stale_tensor": "one projection still holds what it was initialised with",
            "stale_shard": "one shard file is from another checkpoint",
            "norm_lost": "query and key norms are all ones",
            "embedding_shift": "the embedding table is off by one row",
            "vision_qkv_order": "the vision tower's fused projection is read as v, k, q",
            "patch_channels": "the patch embedding is read as blue, green, red",
            "deepstack_mergers": "the two deepstack mergers change places",
        },
    ),
    *_faults(
        "conversion", STEPS, {"expert_order": "experts are numbered from the other end"}, setup="qwen3_vl_moe"
    ),
    *_faults(
        "data",
        STEPS | SOUND,
        {
            "labels_shifted": "labels are shifted twice",
            "header_in_loss": "the question is in the loss",
            "answer_cut": "only the first token of each answer is in the loss",
            "images_shuffled": "images of a micro-batch change places",
            "images_blank": "images are blank",
            "wrong_normalisation": "pixels are scaled to 0..1 instead of -1..1",
            "channels_swapped": "pixels come as blue, green, red",
            "text_positions": "vision tokens get text positions",
            "duplicate_shard": "every second batch is a repetition",
            "data_order": "samples come in another order",
        },
    ),
    *_faults(
        "data",
        END,
        {
            "late_blank": "images are blank from iteration 25 on",
            "late_labels": "labels are shifted twice from iteration 25 on",
        },
        setup="qwen3_vl_long",
    ),
    *_faults(
        "data",
        frozenset({"C6"}),
        {"held_out_blind": "held-out samples are scored without their images"},
        setup="qwen3_vl_long",
    ),
    *_faults(
        "training",
        STEPS | SOUND,
        {
            "learning_rate": "twice the planned learning rate",
            "learning_rate_hidden": "the optimizer takes twice the rate that is logged",
            "warmup_missing": "no warm-up",
            "clip_off": "gradients are not clipped",
            "loss_scaling": "gradients are twice as large",
            "tower_frozen": "the vision tower does not learn",
            "wrong_reduction": "mean of sample means instead of mean over tokens",
            "missing_all_reduce": "gradients of the second half of each batch are dropped",
            "gradients_pile_up": "gradients are not cleared between steps",
            "optimizer_asleep": "the optimizer steps and changes nothing",
            "adam_betas": "beta2 is 0.5 instead of 0.95",
            "loss_smoothed": "the logged loss is an average over past steps",
        },
    ),
    *_faults(
        "measurement",
        WORLD,
        {
            "tokens_times_8": "tokens of all devices counted eight times",
            "real_counts_padding": "padding counts as real tokens",
            "ms_as_s": "seconds in a column of milliseconds",
            "s_as_ms": "microseconds in a column of milliseconds",
            "warmup_counted": "step time is an average since the start",
            "sparse_peak": "utilisation against the peak with sparsity",
            "one_device_for_eight": "world size of eight in a run of one process",
            "nan_dropped": "steps whose loss is not a number are left out",
            "log_restarted": "the file holds two attempts",
            "run_cut_short": "the last steps are missing",
            "batch_size_off": "consumed samples are counted twice",
        },
    ),
    *_faults(
        "speed",
        frozenset({"throughput"}),
        {
            "slower_steps": "every step takes 8% longer",
            "throttled": "steps take 20% longer from iteration 200 on",
        },
        setup="synthetic",
    ),
    *_faults(
        "speed",
        frozenset({"memory"}),
        {"more_memory": "peak memory is 8% higher"},
        setup="synthetic",
    ),
    *_faults(
        "machine",
        frozenset({"machine"}),
        {
            "device_throttled": "heat holds the clock down in 5% of the time",
            "device_taken": "a process is on the device before the run begins",
            "device_shared": "a process comes to the device during the run",
            "memory_errors": "an uncorrected memory error during the run",
            "slow_machine": "a matrix product takes 7% longer than on the baseline's machine",
            "slowed_machine": "a matrix product takes 6% longer after the run than before",
        },
        setup="synthetic",
    ),
    *_faults(
        "baseline",
        FILE,
        {
            "edited_loss": "a loss edited by hand",
            "edited_hardware": "the hardware class edited by hand",
            "nan_loss": "a loss that is not a number, with a fresh hash",
            "other_schema": "another schema version",
            "torn_file": "half a file",
            "other_recipe": "the file of another recipe under this case's name",
        },
    ),
    Fault(
        name="other_hardware",
        area="baseline",
        what="a run from another class of machine than was asked for",
        gates=frozenset({"environment"}),
    ),
    *_faults(
        "inference",
        frozenset({"inference_improvement"}),
        {
            "taught_blind": "the fine-tune sees blank pictures",
            "base_for_tuned": "the answers said to be the fine-tuned model's are the base model's",
            "known_before": "the base model was given the answers with the questions",
        },
        setup="colours",
    ),
    *_faults(
        "inference",
        frozenset({"inference_blank"}),
        {"pictures_left_in": "the pictures said to be blanked are not"},
        setup="colours",
    ),
)
"""All faults, by area."""


def fault_named(name: str) -> Fault:
    """Look a fault up; KeyError for a name that is not in the table."""
    return {fault.name: fault for fault in FAULTS}[name]
