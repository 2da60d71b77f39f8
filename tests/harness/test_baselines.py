# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.baselines import (
    Baseline,
    BaselineKey,
    baseline_of_records,
    find_for_case,
    find_for_record,
    load_baseline,
)
from harness.baselines.checks import check_margins, check_ratchet, lint
from harness.baselines.review import change_text, show
from harness.baselines.schema import content_id
from harness.baselines.store import baseline_path, write_baseline
from harness.baselines.workflow import Proposal, accept, propose, retire
from harness.grading import grade
from harness.policy import Policy
from harness.records import RunRecord, load_record
from models.contract.errors import BaselineError, ConfigError
from suites.detection.synthetic import SyntheticRun, write_synthetic_run

NOW = "2026-01-05T09:00:00+00:00"


def proposal(records: list[RunRecord], directory: Path, policy: Policy, **changes: Any) -> Proposal:
    words = {
        "suite": "convergence",
        "case": "tiny",
        "reason": "first",
        "author": "A. Nother",
        "because": "",
    } | changes
    return propose(records, directory=directory, policy=policy, created_at=NOW, **words)


def measured(records: list[RunRecord], policy: Policy, **key: str) -> Baseline:
    assert records[0].info is not None
    words = {
        "suite": "convergence",
        "case": "tiny",
        "recipe_sha": records[0].info.recipe_sha,
        "hardware": "cpu",
    } | key
    return baseline_of_records(records, key=BaselineKey(**words), policy=policy, created_at=NOW)


def runs(folder: Path, factor: float, seeds: tuple[int, ...] = (5, 6, 7)) -> list[RunRecord]:
    """Launches whose loss is off by a factor."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "lm_loss": row["lm_loss"] * factor} for row in rows]

    return [
        load_record(
            write_synthetic_run(folder / f"{factor}-{seed}", SyntheticRun(run_seed=seed), change_rows=change)
        )
        for seed in seeds
    ]


def test_baseline_survives_its_file(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    baseline = measured(launches, policy)
    path = baseline_path(tmp_path, baseline.key)
    write_baseline(baseline, path)
    again = load_baseline(path)
    assert again == baseline
    assert path == tmp_path / "cpu" / "convergence" / "tiny.json"
    assert again.runs[0].frame()["lm_loss"].tolist() == launches[0].series["lm_loss"].tolist()
    assert again.calibration is not None
    assert (again.calibration.num_runs, again.calibration.num_pairs) == (4, 6)


def test_nothing_overwrites_a_baseline(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    baseline = measured(launches, policy)
    path = baseline_path(tmp_path, baseline.key)
    write_baseline(baseline, path)
    with pytest.raises(BaselineError, match="never overwritten"):
        write_baseline(baseline, path)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        pytest.param(
            lambda d: d["runs"][0]["columns"]["lm_loss"].__setitem__(499, 1.7), "edited by hand", id="loss"
        ),
        pytest.param(lambda d: d["key"].__setitem__("hardware", "h100"), "edited by hand", id="hardware"),
        pytest.param(lambda d: d.__setitem__("baseline_id", "0" * 16), "edited by hand", id="id"),
        pytest.param(lambda d: d.__setitem__("schema_version", 2), "another schema version", id="version"),
        pytest.param(lambda d: d.__setitem__("colour", "red"), "malformed", id="unknown_key"),
        pytest.param(lambda d: d.pop("runs"), "malformed", id="no_runs"),
        pytest.param(
            lambda d: d["runs"][0]["columns"]["lm_loss"].__setitem__(3, "nan"), "malformed", id="nan_text"
        ),
        pytest.param(
            lambda d: d["runs"][0]["columns"]["lm_loss"].__setitem__(3, float("nan")), "NaN", id="nan"
        ),
        pytest.param(lambda d: d["runs"][0]["columns"]["lm_loss"].pop(), "malformed", id="one_value_short"),
    ],
)
def test_touched_file_is_refused(
    edit: Any, text: str, launches: list[RunRecord], policy: Policy, tmp_path: Path
) -> None:
    data = measured(launches[:2], policy).model_dump(mode="json")
    edit(data)
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BaselineError, match=text):
        load_baseline(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\x00"], ids=["empty", "torn", "list", "null", "binary"]
)
def test_foreign_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(text)
    with pytest.raises(BaselineError):
        load_baseline(path)


def test_edit_with_a_new_hash_is_still_not_finite(launches: list[RunRecord], policy: Policy) -> None:
    data = measured(launches[:2], policy).model_dump(mode="json")
    data["runs"][0]["columns"]["lm_loss"][0] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        content_id(data)


def test_look_up_goes_from_strict_to_loose(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    def found(record: RunRecord, hardware: str = "cpu") -> tuple[str, tuple[str, ...]]:
        match = find_for_case(tmp_path, suite="convergence", case="tiny", hardware=hardware, record=record)
        assert (match.baseline is None) == (match.level == "none")
        return match.level, match.notes

    record = launches[0]
    assert found(record) == ("none", ())
    own = measured(launches, policy)
    write_baseline(own, baseline_path(tmp_path, own.key))
    assert found(record) == ("exact", ())
    assert found(record, "h100") == ("other_hardware", ())

    newer = load_record(
        write_synthetic_run(tmp_path / "newer", SyntheticRun(run_seed=9, torch_version="2.12.0"))
    )
    assert found(newer)[0] == "stack_drift"

    other_seed = load_record(write_synthetic_run(tmp_path / "seed", SyntheticRun(data_seed=2)))
    assert found(other_seed)[0] == "other_seed"
    shorter = load_record(write_synthetic_run(tmp_path / "short", SyntheticRun(train_iters=400)))
    level, notes = found(shorter)
    assert level == "none"
    assert "train.train_iters" in notes[0]

    for hardware in ("a100", "h200"):
        other = measured(launches, policy, hardware=hardware)
        write_baseline(other, baseline_path(tmp_path, other.key))
    level, notes = found(record, "h100")
    assert level == "none"
    assert "a100, cpu, h200" in notes[0]


def test_look_up_by_record_alone(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    own = measured(launches, policy)
    write_baseline(own, baseline_path(tmp_path, own.key))
    assert find_for_record(tmp_path, launches[0]).level == "exact"
    assert find_for_record(tmp_path, launches[0], hardware="h100").level == "other_hardware"
    twin = measured(launches, policy, case="twin")
    write_baseline(twin, baseline_path(tmp_path, twin.key))
    with pytest.raises(BaselineError, match="two baselines fit"):
        find_for_record(tmp_path, launches[0])


def test_proposal_is_accepted_and_superseded(
    launches: list[RunRecord], policy: Policy, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = proposal(launches, tmp_path, policy)
    assert first.path.parent == tmp_path / "candidates" / "cpu" / "convergence"
    assert "No baseline of this case was in force" in first.change_path.read_text()
    target = accept(first.path, directory=tmp_path, policy=policy)
    assert load_baseline(target) == first.baseline
    assert not first.path.exists()
    assert not first.change_path.exists()

    second = proposal(
        runs(tmp_path_factory.mktemp("runs"), 1.001),
        tmp_path,
        policy,
        reason="stack-bump",
        because="torch 2.12",
    )
    assert second.baseline.supersedes == first.baseline.baseline_id
    assert second.baseline.anchor_id == first.baseline.baseline_id
    assert "| lm_loss | +0." in second.change
    accept(second.path, directory=tmp_path, policy=policy)
    assert load_baseline(target) == second.baseline
    assert load_baseline(tmp_path / "retired" / f"{first.baseline.baseline_id}.json") == first.baseline
    assert lint(tmp_path, policy, now="2026-01-06T00:00:00+00:00") == []


def test_stale_proposal_is_refused(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    first = proposal(launches, tmp_path, policy)
    second = proposal(launches[:3], tmp_path, policy)
    accept(first.path, directory=tmp_path, policy=policy)
    with pytest.raises(BaselineError, match="another baseline than the one in force"):
        accept(second.path, directory=tmp_path, policy=policy)
    assert load_baseline(tmp_path / "cpu" / "convergence" / "tiny.json") == first.baseline


def test_unexplained_regression_is_refused(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    accept(proposal(launches, tmp_path, policy).path, directory=tmp_path, policy=policy)
    worse = runs(tmp_path / "runs", 1.03)
    with pytest.raises(BaselineError, match="nobody says why"):
        proposal(worse, tmp_path, policy, reason="bugfix")
    assert proposal(worse, tmp_path, policy, reason="bugfix", because="labels were shifted").path.exists()


def test_small_steps_do_not_add_up(
    launches: list[RunRecord], policy: Policy, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    accept(proposal(launches, tmp_path, policy).path, directory=tmp_path, policy=policy)
    second = proposal(runs(folder, 1.04), tmp_path, policy, reason="bugfix", because="one")
    accept(second.path, directory=tmp_path, policy=policy)
    third = proposal(runs(folder, 1.08), tmp_path, policy, reason="bugfix", because="two")
    with pytest.raises(BaselineError, match="drifted"):
        accept(third.path, directory=tmp_path, policy=policy)
    # A change of task starts a new chain.
    fresh = proposal(
        runs(folder, 1.08), tmp_path, policy, reason="recipe-change", because="three", author="B"
    )
    assert fresh.baseline.anchor_id is None
    accept(fresh.path, directory=tmp_path, policy=policy)


def test_anchor_that_is_gone_is_named(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    assert launches[0].info is not None
    baseline = baseline_of_records(
        launches,
        key=BaselineKey(suite="s", case="c", recipe_sha=launches[0].info.recipe_sha, hardware="cpu"),
        policy=policy,
        created_at=NOW,
        chain={"anchor_id": "feedfeedfeedfeed"},
    )
    with pytest.raises(BaselineError, match="anchor"):
        check_ratchet(baseline, tmp_path, policy)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        pytest.param(
            SyntheticRun(run_seed=8, is_dirty=True),
            "clean",
            id="dirty",
        ),
        pytest.param(SyntheticRun(run_seed=8, is_dirty=None), "clean", id="unknown_tree"),
        pytest.param(
            SyntheticRun(run_seed=8, commit="ffff"),
            "differ in commit",
            id="commit",
        ),
        pytest.param(SyntheticRun(run_seed=8, data_seed=2), "differ in recipe", id="recipe"),
        pytest.param(SyntheticRun(run_seed=1), "one launch is there twice", id="twice"),
        pytest.param(
            SyntheticRun(run_seed=8, hardware="h100", device_name="NVIDIA H100"),
            "differ in hardware",
            id="hardware",
        ),
    ],
)
def test_unfit_runs_make_no_baseline(
    run: SyntheticRun, text: str, launches: list[RunRecord], policy: Policy, tmp_path: Path
) -> None:
    odd = load_record(write_synthetic_run(tmp_path / "odd", run))
    with pytest.raises(BaselineError, match=text):
        proposal([*launches[:3], odd], tmp_path, policy)
    assert not (tmp_path / "candidates").exists()


def test_two_runs_are_too_few(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="at least 3"):
        proposal(launches[:2], tmp_path, policy)


def test_unsound_run_makes_no_baseline(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "cut", SyntheticRun(run_seed=8), change_rows=lambda rows: rows[:400])
    with pytest.raises(BaselineError, match="400 of 500"):
        proposal([*launches[:2], load_record(run)], tmp_path, policy)


def test_unknown_reason_is_refused(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown reason"):
        proposal(launches, tmp_path, policy, reason="because")


def test_noise_beyond_the_margin_is_refused(launches: list[RunRecord], policy: Policy) -> None:
    baseline = measured(launches, policy)
    assert baseline.calibration is not None
    check_margins(baseline, policy)
    noisy = baseline.calibration.model_copy(update={"loss_minimum_detectable_change": 0.06})
    with pytest.raises(ConfigError, match="cannot test what is asked"):
        check_margins(baseline.model_copy(update={"calibration": noisy}), policy)
    slow = baseline.calibration.model_copy(update={"step_time_minimum_detectable_change": 0.06})
    check_margins(baseline.model_copy(update={"calibration": slow}), policy)  # step time is advisory on a CPU
    gpu = baseline.key.model_copy(update={"hardware": "h100"})
    with pytest.raises(ConfigError, match="throughput"):
        check_margins(baseline.model_copy(update={"calibration": slow, "key": gpu}), policy)


def on_hosts(folder: Path, *factors: float) -> list[RunRecord]:
    """Launches on GPUs of different speed."""
    return [
        load_record(
            write_synthetic_run(
                folder / str(seed),
                SyntheticRun(run_seed=seed, hardware="h100", device_name="NVIDIA H100", host_factor=factor),
            )
        )
        for seed, factor in enumerate(factors, start=5)
    ]


def test_loss_alone_judges_where_hosts_differ(policy: Policy, tmp_path: Path) -> None:
    launches = on_hosts(tmp_path, 1.0, 1.02, 1.04)
    with pytest.raises(ConfigError, match=r"throughput") as refused:
        proposal(launches, tmp_path / "kept", policy)
    assert "--report-only throughput" in refused.value.fix
    made = proposal(launches, tmp_path / "kept", policy, report_only=("throughput",))
    assert "judges not  throughput" in made.change
    accepted = load_baseline(accept(made.path, directory=tmp_path / "kept", policy=policy))
    assert lint(tmp_path / "kept", policy, now=NOW) == []
    [slow] = on_hosts(tmp_path / "later", 1.5)
    verdict = grade(slow, accepted, policy, hardware="h100")
    [gate] = [gate for gate in verdict.gates if gate.gate == "throughput"]
    assert (verdict.name, gate.status, gate.blocks) == ("PASS", "fail", False)
    assert "advisory: launches of the baseline differ too much" in gate.summary
    judging = accepted.model_copy(update={"report_only": ()})
    assert grade(slow, judging, policy, hardware="h100").name == "REGRESSION"


def test_loss_alone_never_judges_where_hosts_are_alike(policy: Policy, tmp_path: Path) -> None:
    launches = on_hosts(tmp_path, 1.0, 1.0, 1.0)
    with pytest.raises(BaselineError, match="calm enough"):
        proposal(launches, tmp_path / "kept", policy, report_only=("throughput",))


def test_ratchet_holds_no_step_time_that_does_not_judge(policy: Policy, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    slower = (1.2, 1.22, 1.25)  # beyond the cap
    for reason, factors in (("first", (1.0, 1.02, 1.04)), ("stack-bump", slower)):
        made = proposal(
            on_hosts(tmp_path / reason, *factors), folder, policy,
            reason=reason, because="hosts", report_only=("throughput",),
        )  # fmt: skip
        accept(made.path, directory=folder, policy=policy)


def test_lint_names_every_problem(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    two = measured(launches[:2], policy)
    write_baseline(two, tmp_path / "cpu" / "debug" / "elsewhere.json")
    (tmp_path / "cpu" / "debug" / "torn.json").write_text("{")
    problems = "\n".join(lint(tmp_path, policy, now="2026-06-05T09:00:00+00:00"))
    for text in (
        "belongs at cpu/convergence/tiny.json",
        "2 runs, at least 3",
        "151 days old",
        "torn.json: baseline is not",
    ):
        assert text in problems


def test_lint_re_derives_the_recipe_hash(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    wrong = measured(launches, policy, recipe_sha="0" * 16)
    write_baseline(wrong, baseline_path(tmp_path, wrong.key))
    assert any("does not follow from the recipe" in problem for problem in lint(tmp_path, policy, now=NOW))


def test_shipped_baselines_are_clean(policy: Policy) -> None:
    assert [line for line in lint(Path("baselines"), policy, now=NOW) if line.startswith("published")] == []


def test_retire_needs_a_reason_and_keeps_the_file(
    launches: list[RunRecord], policy: Policy, tmp_path: Path
) -> None:
    target = accept(proposal(launches, tmp_path, policy).path, directory=tmp_path, policy=policy)
    with pytest.raises(BaselineError, match="without a reason"):
        retire(target, directory=tmp_path, because=" ", at=NOW)
    moved = retire(target, directory=tmp_path, because="recorded on a broken host", at=NOW)
    assert not target.exists()
    entry = json.loads((tmp_path / "retired" / "retirements.jsonl").read_text())
    assert (load_baseline(moved).baseline_id, entry["because"]) == (
        entry["baseline_id"],
        "recorded on a broken host",
    )
    assert find_for_record(tmp_path, launches[0]).level == "none"


def test_show_and_change_are_readable(launches: list[RunRecord], policy: Policy, tmp_path: Path) -> None:
    baseline = measured(launches, policy)
    text = show(baseline)
    for part in ("convergence/tiny on cpu", baseline.baseline_id, "6 A/A pairs", "end loss", "0123abcd"):
        assert part in text
    stack = SyntheticRun(commit="beef", torch_version="2.12.0")
    newer = [
        load_record(write_synthetic_run(tmp_path / str(n), replace(stack, run_seed=n))) for n in (5, 6, 7)
    ]
    change = change_text(baseline, measured(newer, policy))
    assert "| packages.torch | 2.11.0 | 2.12.0 |" in change
    assert "| learning_rate | +0.000% | 499 | 0 | 0 | 0 | 0 | 0 | 0 |" in change


def test_record_that_is_not_finite_makes_no_baseline(
    launches: list[RunRecord], policy: Policy, tmp_path: Path
) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[5]["lm_loss"] = float("nan")
        return rows

    bad = load_record(write_synthetic_run(tmp_path / "nan", SyntheticRun(run_seed=8), change_rows=change))
    with pytest.raises(BaselineError, match="not finite"):
        measured([*launches, bad], policy)
