# SPDX-License-Identifier: Apache-2.0
"""C0: is this a whole, finite run of the plan it claims? Anything else is INVALID, whatever its loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from harness.records.record import NUMBER_COLUMNS
from harness.verdict import GateResult
from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from harness.baselines.schema import Baseline
    from harness.gates.pairing import Pairing
    from harness.policy import Policy
    from harness.records.record import RunRecord

REQUIRED = ("lm_loss", "grad_norm", "step_time_ms", "consumed_train_samples")
FINITE_WHERE_KNOWN = (*REQUIRED, "learning_rate", "global_batch_size", "num_padded_tokens", "num_real_tokens",
                      "num_supervised_tokens")  # fmt: skip
MAY_BE_MISSING = frozenset({"eval_lm_loss"})
COLUMNS_A_BASELINE_DEMANDS = ("lm_loss", "grad_norm", "step_time_ms", "eval_lm_loss", "peak_memory_bytes")
MIN_STEPS_FOR_STUCK = 5


def sanity(
    record: RunRecord,
    policy: Policy,
    *,
    baseline: Baseline | None = None,
    pairing: Pairing | None = None,
    accept_excerpt: bool = False,
) -> GateResult:
    """Judge a record on its own, and its data order against a baseline of the same recipe.

    Args:
        record: The run.
        policy: Supplies the allowed counts.
        baseline: Baseline of the same recipe, if any.
        pairing: How the two can be compared.
        accept_excerpt: A foreign log may hold only some iterations, as long as the last is there (literal rule).
    """
    faults = [f"source: {problem}" for problem in record.problems]
    warnings: list[str] = []
    missing = [name for name in REQUIRED if not record.has(name)]
    if missing:
        faults.append(f"metrics missing: {', '.join(missing)}")
    completeness, is_excerpt = _completeness(record)
    if completeness and is_excerpt and accept_excerpt:
        warnings += completeness
    else:
        faults += completeness
    faults += _not_finite(record) + _counts(record, policy) + _consumed(record)
    faults += _outcome(record)
    if record.info is not None:
        faults += _plan(record, policy)
    if baseline is not None:
        faults += _against_baseline(record, baseline, pairing)
        warnings += _fingerprints(record, baseline)
    status = "invalid" if faults else "warn" if warnings else "pass"
    text = "; ".join([*faults, *warnings]) or f"{len(record.series)} iterations, all finite, as planned"
    return GateResult(
        gate="C0", status=status, blocks=True, summary=text, details={"faults": faults, "warnings": warnings}
    )


def _completeness(record: RunRecord) -> tuple[list[str], bool]:
    """What iterations are missing; and whether the record is a foreign excerpt that holds the last one."""
    found = [int(value) for value in record.series.index]
    if not found:
        return ["no iterations"], False
    planned = record.planned_iterations
    if planned is None:
        if record.framework == "tensorboard":
            planned = found[-1]
        else:
            return [f"planned number of iterations unknown; the record ends at {found[-1]}"], False
    stride, seen = record.log_interval, set(found)
    # Nothing here may be as long as the plan: a damaged plan can be of any length.
    regular = range(found[0] if found[0] in {1, stride} else stride, planned + 1, stride)
    is_last_extra = planned not in regular
    num_expected = len(regular) + is_last_extra
    num_found = sum(value in regular for value in seen) + (is_last_extra and planned in seen)
    beyond = [value for value in found if value > planned]
    faults = []
    if num_found < num_expected:
        first = next((value for value in regular if value not in seen), planned)
        faults.append(f"{num_found} of {num_expected} iterations: {first} is the first that is missing")
    if beyond:
        faults.append(f"iteration {beyond[0]} is beyond the planned {planned}")
    is_excerpt = not record.is_run_directory and planned in found and not beyond
    return faults, is_excerpt


def _not_finite(record: RunRecord) -> list[str]:
    faults = []
    # Our own recorder writes every number of a step; other stacks leave some out.
    names = dict.fromkeys((*FINITE_WHERE_KNOWN, *(NUMBER_COLUMNS if record.is_run_directory else ())))
    for name in names:
        if name in MAY_BE_MISSING:
            continue
        if not record.has(name):
            continue
        values = record.values(name)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            first = int(record.series.index[bad[0]])
            faults.append(f"{name} is {values[bad[0]]} at iteration {first} ({len(bad)} iterations)")
    if record.has("eval_lm_loss"):
        evaluated = record.values("eval_lm_loss")
        if np.isinf(evaluated).any() or np.isnan(evaluated).all():
            faults.append("eval_lm_loss is not finite")
    if record.has("lm_loss"):
        losses = record.values("lm_loss")
        low = np.flatnonzero(losses <= 0)
        if len(low):
            faults.append(f"lm_loss is {losses[low[0]]} at iteration {int(record.series.index[low[0]])}")
        if len(losses) >= MIN_STEPS_FOR_STUCK and np.ptp(losses) == 0.0:
            faults.append(f"lm_loss is {losses[0]} at every iteration: nothing is being trained or measured")
    if record.has("grad_norm") and (record.values("grad_norm") < 0).any():
        faults.append("grad_norm is negative")
    if record.has("grad_norm") and len(record.series) and (record.values("grad_norm") == 0).all():
        faults.append("grad_norm is 0 at every iteration: nothing is being trained")
    return faults


def _counts(record: RunRecord, policy: Policy) -> list[str]:
    limits = {
        "num_skipped_iterations": policy.sanity.max_skipped_iterations,
        "num_nan_iterations": policy.sanity.max_nan_iterations,
    }
    faults = []
    for name, limit in limits.items():
        if record.has(name):
            total = float(np.nansum(record.values(name)))
            if total > limit:
                faults.append(f"{name} = {total:.0f}, at most {limit} allowed")
    return faults


def _consumed(record: RunRecord) -> list[str]:
    """Consumed samples must grow by the batch size, also in a log that began somewhere in the middle."""
    if not record.has("consumed_train_samples") or not record.has("global_batch_size") or record.series.empty:
        return []
    consumed, sizes = record.values("consumed_train_samples"), record.values("global_batch_size")
    if len(set(sizes)) > 1:
        return [] if (np.diff(consumed) > 0).all() else ["consumed samples do not grow"]
    expected = record.series.index.to_numpy() * sizes[0]
    wrong = np.flatnonzero(consumed != expected)
    if not len(wrong):
        return []
    first = wrong[0]
    return [
        f"consumed samples are {consumed[first]:.0f} at iteration {int(record.series.index[first])}, "
        f"{expected[first]:.0f} by the batch size"
    ]


def _outcome(record: RunRecord) -> list[str]:
    if record.info is None:
        return []
    outcome = record.info.outcome
    faults = []
    if outcome.status != "completed":
        reason = f": {outcome.error.splitlines()[0][:200]}" if outcome.error else ""
        faults.append(f"the run is {outcome.status} at iteration {outcome.iteration}{reason}")
    counts = record.info.sample_counts
    faults += [f"sample count {name} is {count}" for name, count in counts.items() if count < 0]
    data = record.recipe.get("data")
    limit = data.get("max_skipped_fraction") if isinstance(data, dict) else None
    skipped, consumed = counts.get("skipped", 0), counts.get("consumed", 0)
    if isinstance(limit, float) and skipped > 0 and skipped > limit * (skipped + consumed):
        faults.append(f"{skipped} of {skipped + consumed} samples were skipped, at most {limit:.0%} allowed")
    return faults


def _plan(record: RunRecord, policy: Policy) -> list[str]:
    """Learning rate and batch size as the recipe plans them; and the recipe as its hash says."""
    assert record.info is not None
    try:
        recipe = parse_recipe(record.info.recipe, where=record.source)
    except ConfigError as error:
        return [f"the stored recipe is not one of this version: {error.got[:200]}"]
    faults = []
    if recipe.sha() != record.info.recipe_sha:
        faults.append(f"recipe hash is {record.info.recipe_sha}, its content gives {recipe.sha()}")
    if record.info.world_size != recipe.num_processes:
        faults.append(f"world size is {record.info.world_size}, the recipe plans {recipe.num_processes}")
    if record.has("global_batch_size"):
        wrong = np.flatnonzero(record.values("global_batch_size") != recipe.train.global_batch_size)
        if len(wrong):
            iteration = int(record.series.index[wrong[0]])
            faults.append(f"global batch size departs from the recipe's at iteration {iteration}")
    return faults + _learning_rate(record, recipe, policy.sanity.learning_rate_tolerance)


def _learning_rate(record: RunRecord, recipe: Recipe, tolerance: float) -> list[str]:
    """The logged rate is that of the step, or of the next one: stacks differ in when they read it."""
    if not record.has("learning_rate") or record.series.empty:
        return []
    found = record.values("learning_rate")
    firsts: list[int] = []
    for offset in (0, 1):
        planned = np.array([planned_learning_rate(recipe, int(i) - 1 + offset) for i in record.series.index])
        wrong = np.flatnonzero(
            ~np.isclose(found, planned, rtol=tolerance, atol=tolerance * recipe.optimizer.lr)
        )
        if not len(wrong):
            return []
        firsts.append(int(wrong[0]))
    first = max(firsts)
    iteration = int(record.series.index[first])
    return [
        f"learning rate is {found[first]:.6g} at iteration {iteration}, "
        f"the recipe plans {planned_learning_rate(recipe, iteration):.6g}"
    ]


def planned_learning_rate(recipe: Recipe, num_steps: int) -> float:
    """Learning rate after `num_steps` steps: linear warm-up from 0, then decay to `min_lr` (Megatron's schedule)."""
    settings = recipe.optimizer
    warmup, end = settings.lr_warmup_iters, recipe.lr_decay_iters
    if warmup and num_steps <= warmup:
        return settings.lr * num_steps / warmup
    if settings.lr_decay_style == "constant":
        return settings.lr
    if num_steps > end:
        return settings.min_lr
    ratio = (num_steps - warmup) / (end - warmup) if end > warmup else 1.0
    share = 0.5 * (math.cos(math.pi * ratio) + 1.0) if settings.lr_decay_style == "cosine" else 1.0 - ratio
    return settings.min_lr + share * (settings.lr - settings.min_lr)


def _against_baseline(record: RunRecord, baseline: Baseline, pairing: Pairing | None) -> list[str]:
    faults = []
    if record.is_run_directory:
        absent = [name for name in COLUMNS_A_BASELINE_DEMANDS if baseline.has(name) and not record.has(name)]
        if absent:
            faults.append(f"the baseline has {', '.join(absent)}, the run does not")
    same_recipe = record.info is not None and record.info.recipe_sha == baseline.key.recipe_sha
    if same_recipe and pairing is not None and pairing.mode != "paired":
        faults.append(f"same recipe, other data: {pairing.reason}")
    if same_recipe and pairing is not None and pairing.mode == "paired":
        faults += _token_counts(record, baseline)
    return faults


def _token_counts(record: RunRecord, baseline: Baseline) -> list[str]:
    """The same samples have the same number of padded, real and supervised tokens."""
    faults = []
    reference = baseline.runs[0].frame()
    for name in (
        "num_padded_tokens",
        "num_real_tokens",
        "num_supervised_tokens",
        "num_vision_tokens",
        "model_flops",
    ):
        if not record.has(name) or name not in reference:
            continue
        wrong = ~np.isclose(record.values(name), reference[name].to_numpy(), rtol=1e-9, atol=0.0)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            faults.append(
                f"{name} is {record.values(name)[first]:.6g} at iteration {int(record.series.index[first])}, "
                f"{reference[name].iloc[first]:.6g} in the baseline for the same samples"
            )
    return faults


def _fingerprints(record: RunRecord, baseline: Baseline) -> list[str]:
    if record.info is None:
        return []
    run = baseline.runs[0]
    names = ("checkpoint_fingerprint", "dataset_fingerprint")
    return [
        f"{name.replace('_', ' ')} differs from the baseline's"
        for name in names
        if (ours := getattr(record.info, name)) and (theirs := getattr(run, name)) and ours != theirs
    ]
