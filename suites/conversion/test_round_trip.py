# SPDX-License-Identifier: Apache-2.0
"""Hugging Face → Megatron torch_dist → Hugging Face gives back every tensor, bit for bit.

Tiny checkpoints are made for the test, with another value in every element of every tensor, so that no permutation
goes unseen; with random weights they are run beside transformers. Published checkpoints that the site has go through
both.
"""

from pathlib import Path

import pytest

from harness.assets import run_program
from harness.cases import SUITES, discover
from harness.round_trip import round_trip
from harness.session import SessionOptions
from models.contract.site import load_site

TINY = {
    "qwen2_5_vl": ("--family", "qwen2_5_vl"),
    "qwen3_vl": ("--family", "qwen3_vl"),
    "qwen3_vl_moe": ("--family", "qwen3_vl", "--moe"),
    "qwen3_omni": ("--family", "qwen3_omni"),
}


MAX_LOGITS_BYTES = 20e9
"""Larger checkpoints are converted and compared, and not run: one process holds the model in fp32."""


def published() -> list[str]:
    """Checkpoints that recipes name and this site has."""
    site = load_site()
    names = {case.recipe.model.checkpoint for case in discover(SUITES)}
    return sorted(
        name
        for name in names
        if not name.startswith("tiny-") and (site.checkpoint(name) / "config.json").is_file()
    )


@pytest.mark.cpu
@pytest.mark.parametrize("name", TINY, ids=str)
def test_tiny_checkpoint_comes_back_bit_for_bit(name: str, artifacts: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    run_program(["models.entry.convert", "tiny", str(source), *TINY[name], "--init", "coded"])
    data = round_trip(source, tmp_path / "work", artifacts, name=f"tiny {name}")
    assert data["is_equal"]
    assert data["num_equal"] == data["num_tensors"]


@pytest.mark.cpu
@pytest.mark.parametrize("name", TINY, ids=str)
def test_converted_tiny_checkpoint_computes_what_transformers_computes(
    name: str, artifacts: Path, tmp_path: Path
) -> None:
    source = tmp_path / name
    run_program(
        ["models.entry.convert", "tiny", str(source), *TINY[name], "--init", "random", "--dtype", "bf16"]
    )
    data = round_trip(source, tmp_path / "work", artifacts, name=f"tiny {name}, random", logits=True)
    assert [row["dtype"] for row in data["logits"] if row["is_close"]] == ["fp32", "bf16"]


@pytest.mark.parametrize("name", published())
def test_published_checkpoint_comes_back_bit_for_bit(
    name: str, artifacts: Path, session_options: SessionOptions
) -> None:
    site = session_options.site
    source, work = site.checkpoint(name), Path(site.scratch) / "round-trip" / name
    num_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert round_trip(source, work, artifacts, name=name, logits=num_bytes < MAX_LOGITS_BYTES)["is_equal"]
