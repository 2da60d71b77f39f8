# SPDX-License-Identifier: Apache-2.0
"""Families read side by side: the same four modules, with the same public names in each."""

import ast
from pathlib import Path

import pytest

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_omni")
SHARED_NAMES = {
    "config": {"ModelConfig"},
    "model": {"build_model"},
    "weights": {"weight_table", "detect_layout"},
    "data": {"process_video"},
}
OWN_NAMES = {
    ("qwen3_vl", "data"): {"patch_timestamps"},  # it writes times between frames
    ("qwen3_omni", "data"): {"process_audio", "mel_features", "num_audio_tokens", "interleave"},  # it hears
}
"""What one family has beside the shared names, and why."""
MODELS = Path(__file__).resolve().parents[2] / "models"


def public_names(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return {name for name in defined if not name.startswith("_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_holds_exactly_the_four_modules(family: str) -> None:
    assert {file.stem for file in (MODELS / family).glob("*.py")} == {"__init__", *SHARED_NAMES}


@pytest.mark.parametrize("module", list(SHARED_NAMES))
@pytest.mark.parametrize("family", FAMILIES)
def test_family_module_has_the_shared_public_names(family: str, module: str) -> None:
    expected = SHARED_NAMES[module] | OWN_NAMES.get((family, module), set())
    assert public_names(MODELS / family / f"{module}.py") == expected
