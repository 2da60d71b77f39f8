# SPDX-License-Identifier: Apache-2.0
"""Every way known to slip a bad run past a gate. None may end in PASS unless its row says so."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.baselines import Baseline
from harness.grading import compare, grade
from harness.policy import Policy
from harness.records import load_record
from harness.verdict import Verdict
from models.contract.record import METRICS_FILE, RUN_FILE, RunInfo
from suites.detection.machine_faults import NUM_SAMPLES, Machine, write_machine
from suites.detection.synthetic import Row, SyntheticRun, write_synthetic_run

CANDIDATE = SyntheticRun(run_seed=11)
Change = Callable[[list[Row]], list[Row]]


def scaled(factor: float, first: int = 1, last: int = 500, column: str = "lm_loss") -> Change:
    def change(rows: list[Row]) -> list[Row]:
        for row in rows:
            if first <= row["iteration"] <= last and row[column] is not None:
                row[column] *= factor
        return rows

    return change


def set_to(value: object, first: int = 1, last: int = 500, column: str = "lm_loss") -> Change:
    def change(rows: list[Row]) -> list[Row]:
        for row in rows:
            if first <= row["iteration"] <= last:
                row[column] = value
        return rows

    return change


def without(column: str) -> Change:
    def change(rows: list[Row]) -> list[Row]:
        for row in rows:
            del row[column]
        return rows

    return change


def test_healthy_run_passes(tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    verdict = judge(tmp_path, baseline, policy)
    assert verdict.name == "PASS"
    assert status(verdict) == {
        "C0": "pass", "plausibility": "pass", "C1": "pass", "C2": "pass", "C3": "pass", "literal": "pass",
        "C4": "pass", "C5": "pass", "C6": "pass", "throughput": "pass", "memory": "pass",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_to(math.nan), id="all_nan"),
        pytest.param(set_to(math.nan, first=400), id="nan_tail"),
        pytest.param(set_to(math.nan, first=500), id="nan_last"),
        pytest.param(set_to("nan", first=250, last=250), id="string_nan"),
        pytest.param(set_to(math.inf, first=30, last=30), id="inf"),
        pytest.param(set_to("-inf", first=30, last=30), id="minus_inf"),
        pytest.param(set_to(None, first=30, last=30), id="null"),
        pytest.param(set_to("2.5", first=30, last=30), id="number_as_text"),
        pytest.param(set_to(True, first=30, last=30), id="boolean"),
        pytest.param(set_to(0.0, first=30, last=30), id="zero_loss"),
        pytest.param(set_to(-1.0, first=30, last=30), id="negative_loss"),
        pytest.param(set_to(2.0), id="constant_loss"),
        pytest.param(set_to(math.nan, first=3, last=3, column="grad_norm"), id="grad_norm_nan"),
        pytest.param(set_to(0.0, column="grad_norm"), id="grad_norm_zero"),
        pytest.param(set_to(1, first=9, last=9, column="num_skipped_iterations"), id="skipped_iteration"),
        pytest.param(set_to(1, first=9, last=9, column="num_nan_iterations"), id="nan_iteration"),
        pytest.param(lambda rows: rows[:-1], id="499_of_500"),
        pytest.param(lambda rows: rows[1:], id="first_missing"),
        pytest.param(lambda rows: rows[:250] + rows[251:], id="one_missing"),
        pytest.param(lambda rows: [], id="empty"),
        pytest.param(lambda rows: rows[:300] + rows[299:], id="duplicated"),
        pytest.param(lambda rows: rows[:350] + rows[300:], id="restarted"),
        pytest.param(lambda rows: rows[::-1], id="reversed"),
        pytest.param(lambda rows: [*rows[:99], rows[100], rows[99], *rows[101:]], id="reordered"),
        pytest.param(lambda rows: [*rows, {**rows[-1], "iteration": 501}], id="one_too_many"),
        pytest.param(scaled(1.5, column="learning_rate"), id="learning_rate"),
        pytest.param(scaled(1.001, first=200, last=200, column="learning_rate"), id="learning_rate_once"),
        pytest.param(scaled(2, column="consumed_train_samples"), id="consumed_samples"),
        pytest.param(scaled(2, column="global_batch_size"), id="batch_size"),
        pytest.param(set_to("0" * 16, first=77, column="sample_digest"), id="other_samples_from_77"),
        pytest.param(scaled(8, column="num_padded_tokens"), id="padded_tokens_times_8"),
        pytest.param(scaled(8, column="num_real_tokens"), id="real_tokens_times_8"),
        pytest.param(scaled(1.2, column="num_supervised_tokens"), id="supervised_tokens_off"),
        pytest.param(scaled(0.001, column="step_time_ms"), id="ms_as_s"),
        pytest.param(scaled(1000, column="step_time_ms"), id="s_as_ms"),
        pytest.param(set_to(0.0, first=9, last=9, column="step_time_ms"), id="zero_time"),
        pytest.param(set_to(-5.0, first=9, last=9, column="step_time_ms"), id="negative_time"),
        pytest.param(scaled(100, column="peak_memory_bytes"), id="more_memory_than_there_is"),
        pytest.param(without("lm_loss"), id="no_loss"),
        pytest.param(without("grad_norm"), id="no_grad_norm"),
        pytest.param(without("eval_lm_loss"), id="no_held_out_loss"),
        pytest.param(without("peak_memory_bytes"), id="no_memory"),
    ],
)
def test_unsound_rows_are_invalid(change: Change, tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    assert judge(tmp_path, baseline, policy, change).name == "INVALID"
    # Without anything to compare with, it is no better.
    name = grade(load_record(tmp_path / "run"), None, policy).name
    assert name in {"INVALID", "NO_BASELINE"}


@pytest.mark.parametrize(
    ("change", "gates"),
    [
        pytest.param(scaled(1.08), {"C1": "fail", "C2": "fail", "C3": "fail", "C4": "warn"}, id="8%_flat"),
        pytest.param(scaled(0.92), {"C1": "fail", "C2": "fail", "C3": "fail", "C4": "warn"}, id="8%_lower"),
        pytest.param(
            scaled(1.08, first=451), {"C1": "pass", "C2": "pass", "C3": "fail", "C5": "warn"}, id="8%_last_50"
        ),
        pytest.param(scaled(1.06), {"C3": "fail"}, id="6%_flat"),
        pytest.param(scaled(1.02), {"C1": "fail", "C3": "pass", "C4": "warn"}, id="2%_flat"),
        pytest.param(scaled(1.004, last=1), {"C1": "fail", "C2": "pass", "C3": "pass"}, id="first_forward"),
        pytest.param(
            scaled(1.004, first=2, last=20), {"C1": "pass", "C2": "fail", "C3": "pass"}, id="first_steps"
        ),
        pytest.param(
            scaled(1.1, column="grad_norm"), {"C1": "pass", "C2": "fail", "C3": "pass"}, id="grad_norm"
        ),
        pytest.param(scaled(1.04, column="eval_lm_loss"), {"C3": "pass", "C6": "fail"}, id="held_out"),
        pytest.param(scaled(0.96, column="eval_lm_loss"), {"C3": "pass", "C6": "fail"}, id="held_out_lower"),
    ],
)
def test_shifted_loss_is_a_regression(
    change: Change, gates: dict[str, str], tmp_path: Path, baseline: Baseline, policy: Policy
) -> None:
    verdict = judge(tmp_path, baseline, policy, change)
    assert verdict.name == "REGRESSION"
    assert gates.items() <= status(verdict).items()


@pytest.mark.parametrize(
    ("change", "gates"),
    [
        pytest.param(scaled(1.08, first=500), {"literal": "fail", "C3": "pass"}, id="8%_at_500_alone"),
        pytest.param(scaled(1.02, first=50), {"C3": "pass", "C4": "warn"}, id="2%_from_50"),
        pytest.param(scaled(1.05, first=201, last=225), {"C3": "pass", "C5": "warn"}, id="bump"),
    ],
)
def test_what_may_pass_is_flagged(
    change: Change, gates: dict[str, str], tmp_path: Path, baseline: Baseline, policy: Policy
) -> None:
    verdict = judge(tmp_path, baseline, policy, change)
    assert verdict.name == "PASS"
    assert gates.items() <= status(verdict).items()


def test_literal_mode_lets_one_point_decide(tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    judge(tmp_path, baseline, policy, scaled(1.08, first=500))
    record = load_record(tmp_path / "run")
    assert grade(record, baseline, policy, gate_mode="literal").name == "REGRESSION"
    assert grade(record, baseline, policy, gate_mode="off").name == "PASS"
    judge(tmp_path, baseline, policy, lambda rows: rows[:499])
    assert grade(load_record(tmp_path / "run"), baseline, policy, gate_mode="literal").name == "INVALID"


def test_other_run_length_is_never_compared(tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    run = SyntheticRun(run_seed=11, train_iters=400)
    record = load_record(write_synthetic_run(tmp_path / "run", run))
    verdict = grade(record, baseline, policy)
    assert verdict.name == "INCONCLUSIVE"
    gate = verdict.gate("C3")
    assert gate is not None
    assert "refused" in gate.summary


def test_metric_missing_in_baseline_is_no_baseline(
    tmp_path: Path, baseline: Baseline, policy: Policy
) -> None:
    data = baseline.model_dump(mode="json")
    for run in data["runs"]:
        del run["columns"]["lm_loss"]
    lossless = Baseline.model_validate_json(json.dumps(data))
    assert judge(tmp_path, lossless, policy).name == "NO_BASELINE"
    assert judge(tmp_path, None, policy).name == "NO_BASELINE"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"outcome": {"status": "failed", "iteration": 500, "phase": "training"}}, id="failed"),
        pytest.param({"outcome": {"status": "running", "iteration": 500, "phase": "training"}}, id="killed"),
        pytest.param(
            {"outcome": {"status": "interrupted", "iteration": 500, "phase": "training"}}, id="interrupted"
        ),
        pytest.param({"recipe_sha": "0" * 16}, id="other_recipe_hash"),
        pytest.param({"recipe": {}}, id="no_recipe"),
        pytest.param({"world_size": 8}, id="world_size"),
        pytest.param({"sample_counts": {"consumed": 4000, "skipped": 400}}, id="too_many_skipped"),
        pytest.param({"ended_at": "2026-01-05T08:00:02+00:00"}, id="steps_longer_than_the_run"),
        pytest.param({"ended_at": "2026-01-05T07:00:00+00:00"}, id="clock_set_back"),
        pytest.param({"ended_at": "yesterday"}, id="no_time"),
    ],
)
def test_unsound_run_info_is_invalid(
    change: dict[str, object], tmp_path: Path, baseline: Baseline, policy: Policy
) -> None:
    def changed(info: RunInfo) -> RunInfo:
        return RunInfo.model_validate_json(json.dumps(info.model_dump(mode="json") | change))

    record = load_record(write_synthetic_run(tmp_path / "run", CANDIDATE, change_info=changed))
    assert grade(record, baseline, policy).name == "INVALID"


@pytest.mark.parametrize(
    ("error", "name"),
    [
        ("rank 0: Traceback\ntorch.distributed.DistNetworkError: refused", "INFRA_ERROR"),
        ("rank 0: ConfigError: the recipe is wrong", "INVALID"),
        ("rank 0: Traceback\nValueError: shapes differ", "INVALID"),
    ],
    ids=["network", "ours", "code"],
)
def test_only_the_machine_makes_an_infra_error(
    error: str, name: str, tmp_path: Path, baseline: Baseline, policy: Policy
) -> None:
    def died(info: RunInfo) -> RunInfo:
        info.outcome.status, info.outcome.phase, info.outcome.error = "failed", "startup", error
        return info

    write_synthetic_run(tmp_path / "run", CANDIDATE, change_rows=lambda rows: [], change_info=died)
    assert grade(load_record(tmp_path / "run"), baseline, policy).name == name


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="torn"),
        pytest.param("[1, 2]", id="list"),
        pytest.param("null", id="null"),
        pytest.param('{"schema_version": 99}', id="newer"),
        pytest.param("\x00\xff binary", id="binary"),
    ],
)
@pytest.mark.parametrize("file", [RUN_FILE, METRICS_FILE])
def test_half_written_or_foreign_file_is_invalid(
    file: str, text: str, tmp_path: Path, baseline: Baseline, policy: Policy
) -> None:
    write_synthetic_run(tmp_path / "run", CANDIDATE)
    (tmp_path / "run" / file).write_bytes(text.encode("latin-1"))
    record = load_record(tmp_path / "run")
    assert record.problems
    assert grade(record, baseline, policy).name == "INVALID"


def test_torn_last_line_is_invalid(tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    file = write_synthetic_run(tmp_path / "run", CANDIDATE) / METRICS_FILE
    file.write_text(file.read_text()[:-1])
    assert grade(load_record(tmp_path / "run"), baseline, policy).name == "INVALID"


def test_rate_beyond_the_peak_is_invalid(tmp_path: Path, policy: Policy) -> None:
    run = SyntheticRun(run_seed=11, hardware="h20", device_name="NVIDIA H20")
    # 120 ms a step: 561 TFLOP/s is 6.7e13 FLOPs.
    record = load_record(
        write_synthetic_run(tmp_path / "run", run, change_rows=set_to(6.7e13, column="megatron_flops"))
    )
    verdict = grade(record, None, policy)
    assert verdict.name == "INVALID"
    gate = verdict.gate("plausibility")
    assert gate is not None
    assert "not possible on this device" in gate.summary


def test_sparse_peak_is_invalid(tmp_path: Path, policy: Policy) -> None:
    run = SyntheticRun(run_seed=11, hardware="h200", device_name="NVIDIA H200")

    def reports_mfu(peak: float) -> Change:
        def change(rows: list[Row]) -> list[Row]:
            for row in rows:
                row["model_flops"] = 4e13
                row["extra"] = {"mfu": 4e13 / row["step_time_ms"] * 1e3 / 1e12 / peak}
            return rows

        return change

    names = {
        peak: grade(
            load_record(write_synthetic_run(tmp_path / str(peak), run, change_rows=reports_mfu(peak))),
            None,
            policy,
        ).name
        for peak in (989.4, 1978.9)
    }
    assert names == {989.4: "NO_BASELINE", 1978.9: "INVALID"}


def test_wrong_hardware_is_a_mismatch(tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    run = SyntheticRun(run_seed=11, hardware="h100", device_name="NVIDIA H100 80GB HBM3")
    record = load_record(write_synthetic_run(tmp_path / "run", run))
    assert grade(record, None, policy, hardware="h20").name == "ENV_MISMATCH"
    assert grade(record, baseline, policy, hardware="h20").name == "ENV_MISMATCH"
    # On its own hardware it has a baseline of another class: advisory only.
    verdict = grade(record, baseline, policy, hardware="h100")
    assert (verdict.name, verdict.match_level) == ("NO_BASELINE", "other_hardware")
    assert verdict.gate("throughput") is None
    assert grade(record, None, policy, hardware="h200x").name == "ENV_MISMATCH"


def test_slow_run_is_a_regression_on_a_gpu(tmp_path: Path, policy: Policy) -> None:
    gpu = {"hardware": "h100", "device_name": "NVIDIA H100 80GB HBM3"}
    records = [
        load_record(write_synthetic_run(tmp_path / str(seed), SyntheticRun(run_seed=seed, **gpu)))
        for seed in (1, 2, 3)
    ]
    from harness.baselines import BaselineKey, baseline_of_records

    key = BaselineKey(suite="s", case="c", recipe_sha=records[0].info.recipe_sha, hardware="h100")  # type: ignore[union-attr]
    reference = baseline_of_records(records, key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00")
    names = {
        factor: grade(
            load_record(
                write_synthetic_run(
                    tmp_path / f"f{factor}", SyntheticRun(run_seed=9, host_factor=factor, **gpu)
                )
            ),
            reference,
            policy,
        )
        for factor in (1.0, 1.04, 1.08, 0.9, 20.0)
    }
    found = {factor: (verdict.name, status(verdict).get("throughput")) for factor, verdict in names.items()}
    assert found == {
        1.0: ("PASS", "pass"),
        1.04: ("PASS", "warn"),
        1.08: ("REGRESSION", "fail"),
        0.9: ("PASS_IMPROVED", "pass"),
        20.0: ("INVALID", None),
    }


def test_more_memory_is_a_regression_on_a_gpu(tmp_path: Path, baseline: Baseline, policy: Policy) -> None:
    verdict = judge(tmp_path, baseline, policy, scaled(1.07, column="peak_memory_bytes"))
    assert (verdict.name, status(verdict)["memory"]) == ("PASS", "warn")  # resident size of a CPU process
    from harness.gates.memory import memory

    gate = memory(load_record(tmp_path / "run"), baseline, policy, hardware="h100")
    assert (gate.status, gate.blocks) == ("fail", True)


def test_published_log_against_itself(seed_log: Path, policy: Policy) -> None:
    from harness.baselines import find_for_record

    record = load_record(seed_log)
    match = find_for_record(Path("baselines"), record)
    assert match.level == "published"
    verdicts = {
        (mode, hardware): grade(record, match.baseline, policy, gate_mode=mode, hardware=hardware).name
        for mode in ("tost", "literal", "off")
        for hardware in (None, "h100", "h20")
    }
    arithmetic = grade(record, match.baseline, policy).gate("arithmetic")
    assert arithmetic is not None
    assert arithmetic.status == "pass"
    assert "560.9, 529.7, 559.6, 552.0" in arithmetic.summary
    # Four of five hundred lines are no convergence run; the literal rule only asks for the last.
    assert verdicts == {
        ("tost", None): "INVALID", ("tost", "h100"): "INVALID", ("tost", "h20"): "INVALID",
        ("literal", None): "PASS", ("literal", "h100"): "PASS", ("literal", "h20"): "INVALID",
        ("off", None): "INVALID", ("off", "h100"): "INVALID", ("off", "h20"): "INVALID",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        pytest.param("1.596570E+00", "1.690000E+00", "REGRESSION", id="beyond_5%"),
        pytest.param("1.596570E+00", "1.670000E+00", "PASS", id="within_5%"),
        pytest.param("1.596570E+00", "NAN", "INVALID", id="nan"),
        pytest.param("1.596570E+00", "inf", "INVALID", id="inf"),
        pytest.param(" | lm loss: 1.596570E+00", "", "INVALID", id="no_loss"),
        pytest.param("5622.0", "5.622", "INVALID", id="seconds"),
        pytest.param("11657.0", "93256.0", "INVALID", id="tokens_of_all_gpus"),
        pytest.param("32000", "32064", "INVALID", id="consumed_samples"),
        pytest.param("nan iterations:   0", "nan iterations:   1", "INVALID", id="nan_iteration"),
        pytest.param("09:54:09", "09:44:09", "INVALID", id="clock_back"),
        pytest.param("09:54:09", "19:54:09", "INVALID", id="clock_jump"),
    ],
)
def test_changed_published_log(old: str, new: str, verdict: str, seed_log: Path, policy: Policy) -> None:
    from harness.baselines import load_baseline

    lines = seed_log.read_text().splitlines(keepends=True)
    lines[-1] = lines[-1].replace(old, new)
    seed_log.write_text("".join(lines))
    reference = load_baseline(Path("baselines/published/qwen2_5_vl_7b_llava_pretrain.json"))
    assert (
        grade(load_record(seed_log), reference, policy, gate_mode="literal", hardware="h100").name == verdict
    )


def test_log_shifted_by_one_iteration_is_not_paired(seed_log: Path, policy: Policy, tmp_path: Path) -> None:
    from harness.baselines import BaselineKey, baseline_of_records
    from harness.gates.pairing import pair

    key = BaselineKey(suite="s", case="c", recipe_sha="", hardware="unknown")
    record = load_record(seed_log)
    baseline = baseline_of_records([record], key=key, policy=policy, created_at="2026-01-05T09:00:00+00:00")
    shifted = tmp_path / "shifted.log"
    text = seed_log.read_text()
    for n in (500, 482, 481, 480):
        text = text.replace(f"iteration {n:8d}/", f"iteration {n + 1:8d}/")
    shifted.write_text(text)
    assert pair(load_record(shifted), baseline).mode == "refused"
    renumbered = tmp_path / "renumbered.log"
    renumbered.write_text(seed_log.read_text().replace("       32000 |", "       32064 |"))
    pairing = pair(load_record(renumbered), baseline)
    assert (pairing.mode, pairing.first_difference) == ("refused", 500)


def test_compare_refuses_an_unsound_reference(tmp_path: Path, policy: Policy) -> None:
    good = load_record(write_synthetic_run(tmp_path / "good", CANDIDATE))
    bad = load_record(write_synthetic_run(tmp_path / "bad", CANDIDATE, change_rows=set_to(math.nan)))
    other = load_record(write_synthetic_run(tmp_path / "other", SyntheticRun(run_seed=12)))
    assert compare(good, bad, policy).name == "INVALID"
    assert compare(bad, good, policy).name == "INVALID"
    assert compare(good, other, policy).name == "PASS"


def judge(tmp_path: Path, baseline: Baseline | None, policy: Policy, change: Change | None = None) -> Verdict:
    """Write the candidate with a change, read it back and grade it."""
    return grade(
        load_record(write_synthetic_run(tmp_path / "run", CANDIDATE, change_rows=change)), baseline, policy
    )


def status(verdict: Verdict) -> dict[str, str]:
    return {gate.gate: gate.status for gate in verdict.gates}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (Machine(), "PASS"),
        (Machine(throttled_samples=NUM_SAMPLES), "INVALID"),
        (Machine(throttled_samples=1), "INVALID"),  # 1.7% of a minute
        (Machine(foreign_processes=1), "INVALID"),
        (Machine(matmul_tflops=(790.0, 700.0)), "INVALID"),
    ],
)
def test_a_good_time_of_a_machine_at_fault_is_no_pass(
    machine: Machine, name: str, tmp_path: Path, policy: Policy
) -> None:
    runs = {seed: SyntheticRun(run_seed=seed, hardware="h200", device_name="NVIDIA H200") for seed in (1, 11)}
    records = [
        load_record(
            write_machine(
                write_synthetic_run(tmp_path / str(seed), run), machine if seed == 11 else Machine()
            )
        )
        for seed, run in runs.items()
    ]
    assert compare(records[1], records[0], policy).name == name


def test_a_machine_file_of_something_else_hides_no_fault(tmp_path: Path, policy: Policy) -> None:
    """Garbage in place of the samples is said; it is no way past the gate of another device."""
    run = write_synthetic_run(tmp_path / "run", SyntheticRun(hardware="h200", device_name="NVIDIA H200"))
    write_machine(run, Machine(throttled_samples=NUM_SAMPLES))
    (run / "telemetry-node-1.jsonl").write_text("garbage")
    verdict = grade(load_record(run), None, policy)
    gate = verdict.gate("machine")
    assert gate is not None
    assert gate.status == "invalid"
    assert "telemetry cannot be read: telemetry-node-1.jsonl" in gate.summary
