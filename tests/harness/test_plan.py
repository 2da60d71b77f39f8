# SPDX-License-Identifier: Apache-2.0
"""The plan: where sizes come from, memory, disk, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cases import SUITES, Case, cases_of_recipe
from harness.hardware import Probe
from harness.plan import plan_case, plan_text, require_possible
from models.contract.errors import ConfigError
from models.contract.families import PUBLISHED, published_name
from models.contract.recipe import parse_recipe
from models.contract.site import Site

H200 = Probe(kind="cuda", device_name="NVIDIA H200", device_count=8, memory_bytes=141 * 10**9)
SEVEN_B = SUITES / "convergence" / "qwen2_5_vl_7b_llava_pretrain.toml"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(checkpoints=str(tmp_path / "checkpoints"), datasets=str(tmp_path / "datasets"))


def case_on(hardware: str, file: Path = SEVEN_B) -> Case:
    return replace(cases_of_recipe(file)[0], hardware=hardware)


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("Qwen2.5-VL-7B-Instruct", "qwen2_5_vl_7b"),
        ("/data/hf/Qwen3-VL-30B-A3B-Thinking", "qwen3_vl_30b_a3b"),
        ("Qwen3-Omni-30B-A3B-Instruct", "qwen3_omni_30b_a3b"),
        ("./Qwen2.5VL-7B-Instruct-to-mcore", "qwen2_5_vl_7b"),
        ("/mnt/Qwen3-VL-30B-A3B-Instruct-to-mcore", "qwen3_vl_30b_a3b"),
        ("ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp", "qwen3_vl_30b_a3b"),
        ("tiny-qwen3_vl", None),
        ("Qwen2.5-VL-7B-Instruct-AWQ", None),
    ],
)
def test_published_name_reads_a_checkpoint_name(checkpoint: str, name: str | None) -> None:
    assert published_name(checkpoint) == name


def test_plan_without_checkpoint_takes_the_published_sizes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * 2**30)  # whatever this machine has
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    plan = plan_case(case_on("h200"), site, baselines=tmp_path, probe=H200)
    assert plan.training is not None
    assert plan.training.parameters.total == 8_292_166_656
    assert plan.sizes_from.startswith("published qwen2_5_vl_7b")
    assert plan.refused == ()
    assert [text.split()[0] for text in plan.missing] == ["checkpoint", "dataset"]
    text = plan_text([plan])
    assert "weights 15.4, gradients 30.9, optimizer 11.6" in text
    assert "devices:      8, dp 8, 8 micro-batch(es) of 1" in text


def test_plan_prefers_the_checkpoint_over_its_name(site: Site, tmp_path: Path) -> None:
    folder = site.checkpoint("Qwen2.5-VL-7B-Instruct")
    folder.mkdir(parents=True)
    shutil.copyfile(PUBLISHED / "qwen2_5_vl_3b.json", folder / "config.json")
    plan = plan_case(case_on("h200"), site, baselines=tmp_path, probe=H200)
    assert plan.training is not None
    assert plan.training.parameters.total == 3_754_622_976
    assert plan.sizes_from == str(folder / "config.json")


def test_plan_refuses_what_does_not_fit_and_names_a_change(site: Site, tmp_path: Path) -> None:
    plan = plan_case(case_on("h20"), site, baselines=tmp_path, probe=H200)
    assert len(plan.refused) == 1
    assert 'smallest change that fits: precision.recompute = "full"' in plan.refused[0]
    with pytest.raises(ConfigError, match="1 case") as caught:
        require_possible([plan])
    assert "qwen2_5_vl_7b_llava_pretrain@h20" in str(caught.value)
    require_possible([])


def test_plan_refuses_a_layout_that_breaks_a_rule(site: Site, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'extends = "{SEVEN_B}"\nname = "eight_ways"\n[parallel]\ntensor_model_parallel_size = 8\n'
    )
    plan = plan_case(case_on("h200", recipe), site, baselines=tmp_path, probe=H200)
    assert any("num_query_groups" in text for text in plan.refused)


@pytest.mark.parametrize(
    ("checkpoint", "parallel", "rule"),
    [
        ("tiny-qwen3_vl", "tensor_model_parallel_size = 4", "num_query_groups must be a multiple"),
        ("tiny-qwen3_vl_moe", "tensor_model_parallel_size = 2", "needs sequence_parallel"),
        ("sized-qwen3_vl_2b", "pipeline_model_parallel_size = 8", "must divide over the other stages"),
    ],
)
def test_plan_knows_the_sizes_of_a_checkpoint_that_is_made_on_the_spot(
    site: Site, tmp_path: Path, checkpoint: str, parallel: str, rule: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'extends = "{SEVEN_B}"\nname = "eight_ways"\n[parallel]\n{parallel}\n'
        f'[model]\nfamily = "qwen3_vl"\ncheckpoint = "{checkpoint}"\n'
    )
    plan = plan_case(case_on("h200", recipe), site, baselines=tmp_path, probe=H200)
    assert any(rule in text for text in plan.refused), plan.refused
    assert "made on the spot" in plan.sizes_from


def test_plan_refuses_checkpoints_that_the_disk_cannot_hold(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    plan = plan_case(case_on("h200"), site, baselines=tmp_path, probe=H200)
    assert plan.disk_gib == pytest.approx(8_292_166_656 * 2 / 2**30, rel=1e-3)
    assert any("10.0 GiB are free" in text for text in plan.refused)
    # on another machine this disk says nothing
    elsewhere = Probe(kind="cpu", device_name="", device_count=0, memory_bytes=0)
    assert plan_case(case_on("h200"), site, baselines=tmp_path, probe=elsewhere).refused == ()


@pytest.mark.parametrize(
    ("checkpoint", "num_at_once"),
    [
        ({"save_interval": 100_000}, 1),  # longer than the run: the last one alone
        ({"save_interval": 400}, 2),  # at 400 and at the end
        ({"save_interval": 100, "keep_last": 2}, 3),  # two are kept while the third is written
        ({"save_interval": 400, "save_final": False}, 1),
        ({"save_interval": 1000, "save_final": False}, 0),
    ],
)
def test_plan_counts_the_checkpoints_that_lie_on_disk_at_once(
    checkpoint: dict[str, object], num_at_once: int, site: Site, tmp_path: Path
) -> None:
    case = case_on("h200")
    data = case.recipe.model_dump(mode="json")
    data["checkpoint"] |= checkpoint
    plan = plan_case(
        replace(case, recipe=parse_recipe(data, where="test")), site, baselines=tmp_path, probe=H200
    )
    assert plan.disk_gib == pytest.approx(num_at_once * 8_292_166_656 * 2 / 2**30, rel=1e-3, abs=1e-3)


def test_plan_names_a_missing_input_once(site: Site, tmp_path: Path) -> None:
    case = case_on("h200")
    data = case.recipe.model_dump(mode="json")
    data["data"]["eval_dataset"] = data["data"]["dataset"]
    plan = plan_case(
        replace(case, recipe=parse_recipe(data, where="test")), site, baselines=tmp_path, probe=H200
    )
    assert len(plan.missing) == 2
