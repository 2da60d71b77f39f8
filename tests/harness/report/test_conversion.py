# SPDX-License-Identifier: Apache-2.0
"""The report shows what a conversion compared: every tensor, the worst of them, logits; and fails with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.report.build import JSON_FILE, build_report


def tensor(name: str, *, equal: bool = True) -> dict[str, Any]:
    return {
        "name": name, "shape": [3, 5], "dtype": "bfloat16", "num_bytes": 30, "checksum": "ab" * 32,
        "other_checksum": "ab" * 32, "equal": equal, "num_different": int(not equal), "max_difference": 0.0,
        "not_finite": 0, "detail": "" if equal else "1 elements differ",
    }  # fmt: skip


def logits(dtype: str, *, is_close: bool = True) -> dict[str, Any]:
    return {
        "dtype": dtype, "num_real_tokens": 168, "max_error": 1.2e-6, "rms_error": 7.6e-7,
        "reference_rms_error": 0.0 if dtype == "fp32" else 0.012, "same_token": 0.97, "limit": 1e-4,
        "is_close": is_close,
    }  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    data = {
        "name": "tiny", "is_equal": True, "num_tensors": 2, "num_equal": 2, "num_bytes": 60, "different": [],
        "missing": [], "unexpected": [], "declared": {}, "not_finite": [], "worst": [],
        "tensors": [tensor("a.weight"), tensor("b.weight")], "logits": [logits("fp32"), logits("bf16")],
    } | changes  # fmt: skip
    (folder / "conversion.json").write_text(json.dumps(data))
    return folder


def overall(folder: Path) -> str:
    return json.loads((folder / JSON_FILE).read_text())["overall"]


def test_every_tensor_and_both_formats_are_shown(tmp_path: Path) -> None:
    html = build_report([write(tmp_path)], tmp_path / "out").read_text(encoding="utf-8")
    for text in ("a.weight", "3 × 5", "abababababab", "1.2e-06", "97.0% / 168", "1.2e-02"):
        assert text in html, text
    assert "logits against transformers" in (tmp_path / "out" / "report.md").read_text()
    assert overall(tmp_path / "out") == "PASSED"


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": [logits("fp32", is_close=False)]},
        {"different": [{"name": "a.weight", "detail": "1 elements differ"}]},
        {"missing": ["a.weight"]},
        {"unexpected": ["c.weight"]},
    ],
    ids=["logits", "different", "missing", "unexpected"],
)
def test_whatever_is_not_as_expected_fails_the_report(tmp_path: Path, changes: dict[str, Any]) -> None:
    build_report([write(tmp_path, **changes)], tmp_path / "out")
    assert overall(tmp_path / "out") == "FAILED"


def test_a_comparison_without_logits_is_still_read(tmp_path: Path) -> None:
    write(tmp_path, logits=[])
    data = json.loads((tmp_path / "conversion.json").read_text())
    del data["logits"], data["tensors"]
    (tmp_path / "conversion.json").write_text(json.dumps(data))
    build_report([tmp_path], tmp_path / "out")
    assert overall(tmp_path / "out") == "PASSED"
