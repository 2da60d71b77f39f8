# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from models.contract.errors import ConfigError
from models.contract.site import Site, load_site


def test_site_finds_names_below_its_folders_and_keeps_paths(tmp_path: Path) -> None:
    site = Site(checkpoints=str(tmp_path / "c"), datasets=str(tmp_path / "d"))
    assert site.checkpoint("qwen") == tmp_path / "c" / "qwen"
    assert site.dataset(str(tmp_path)) == tmp_path


def test_site_reads_the_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.toml"
    file.write_text('checkpoints = "/c"\n')
    monkeypatch.setenv("QWEN_HARNESS_SITE", str(file))
    assert load_site().checkpoints == "/c"


@pytest.mark.parametrize("text", ['checkpoint = "/c"\n', "checkpoints = 3\n", "checkpoints = \n"])
def test_site_malformed_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="malformed"):
        load_site(file)


def test_site_named_and_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        load_site(tmp_path / "none.toml")
