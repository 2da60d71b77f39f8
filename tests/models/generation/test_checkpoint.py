# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from models.contract.errors import ConfigError, WeightMappingError
from models.contract.record import RunInfo, write_run_info
from models.contract.site import Site
from models.generation.checkpoint import CheckpointSource, fingerprint, resolve_checkpoint


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"0" * 100_000)
    return Site(checkpoints=str(tmp_path / "checkpoints"))


def run_of(folder: Path, *, with_info: bool = True) -> Path:
    iteration = folder / "checkpoints" / "iter_0000500"
    iteration.mkdir(parents=True)
    for name in (".metadata", "metadata.json", "__0_0.distcp"):
        (iteration / name).write_bytes(b"x")
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("500\n")
    if with_info:
        info = RunInfo(
            run_id="r", recipe={"model": {"checkpoint": "tiny"}}, recipe_sha="0", family="qwen3_vl", command=[],
            started_at="", world_size=1,
        )  # fmt: skip
        write_run_info(folder, info)
    return iteration


def test_hf_folder_is_its_own_source(site: Site) -> None:
    folder = site.checkpoint("tiny")
    assert resolve_checkpoint(folder, hf_folder=None, site=site) == CheckpointSource(folder)


def test_run_directory_knows_the_folder_it_started_from(site: Site, tmp_path: Path) -> None:
    iteration = run_of(tmp_path / "run")
    expected = CheckpointSource(site.checkpoint("tiny"), iteration)
    assert resolve_checkpoint(tmp_path / "run", hf_folder=None, site=site) == expected
    assert resolve_checkpoint(iteration, hf_folder=None, site=site) == expected


def test_megatron_checkpoint_alone_asks_for_its_hf_folder(site: Site, tmp_path: Path) -> None:
    iteration = run_of(tmp_path / "run", with_info=False)
    with pytest.raises(ConfigError, match="--hf-folder"):
        resolve_checkpoint(iteration, hf_folder=None, site=site)
    given = site.checkpoint("tiny")
    assert resolve_checkpoint(iteration, hf_folder=given, site=site).hf_folder == given


def test_run_without_checkpoint_and_other_folders_are_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint folder not found"):
        resolve_checkpoint(tmp_path / "nowhere", hf_folder=None, site=site)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"not a checkpoint[\s\S]*an empty folder"):
        resolve_checkpoint(tmp_path / "empty", hf_folder=None, site=site)


def test_tracker_to_nowhere_is_named(site: Site, tmp_path: Path) -> None:
    iteration = run_of(tmp_path / "run")
    (iteration.parent / "latest_checkpointed_iteration.txt").write_text("600")
    with pytest.raises(WeightMappingError, match="iter_0000600"):
        resolve_checkpoint(tmp_path / "run", hf_folder=None, site=site)


def test_fingerprint_follows_the_weights(site: Site) -> None:
    source = CheckpointSource(site.checkpoint("tiny"))
    before = fingerprint(source)
    assert fingerprint(source) == before
    (source.hf_folder / "model.safetensors").write_bytes(b"1" * 100_000)
    assert fingerprint(source) != before
