# SPDX-License-Identifier: Apache-2.0
"""Families read side by side: the same four modules, with the public names that the rest of the code relies on."""

import ast
from pathlib import Path

import pytest

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_omni")
SHARED_NAMES = {
    "config": "ModelConfig",
    "model": "build_model",
    "weights": "weight_table",
    "data": "build_batch",
}
MODELS = Path(__file__).resolve().parents[2] / "models"


def public_names(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return {name for name in defined if not name.startswith("_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_holds_exactly_the_four_modules(family: str) -> None:
    assert {file.stem for file in (MODELS / family).glob("*.py")} == {"__init__", *SHARED_NAMES}


@pytest.mark.parametrize("module", list(SHARED_NAMES))
def test_families_share_public_names(module: str) -> None:
    names = {family: public_names(MODELS / family / f"{module}.py") for family in FAMILIES}
    assert all(SHARED_NAMES[module] in found for found in names.values()), names
    assert len({frozenset(found) for found in names.values()}) == 1, names
