# SPDX-License-Identifier: Apache-2.0
"""Any layout to any layout, bit for bit, with weights whose every element codes its position.

Oracles: megatron-core's own sharded loads and saves, and the bytes of the source folder.
"""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.contract.tiny_config import tiny_config
from models.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from models.conversion.tiny import write_tiny_checkpoint

WORKER = Path(__file__).with_name("layout_worker.py")
REPOSITORY = Path(__file__).parents[3]
DENSE = (("qwen2_5_vl", False), ("qwen3_vl", False))
MOE = (("qwen3_vl", True), ("qwen3_omni", True))

TWO = [
    (kind, layout)
    for kinds, layouts in (
        (DENSE, ({"tp": 2}, {"pp": 2})),
        (MOE, ({"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 1})),
    )
    for kind in kinds
    for layout in layouts
]
FOUR = [
    (kind, layout)
    for kinds, layouts in (
        (DENSE, ({"tp": 4}, {"tp": 2, "pp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2})),
        (
            MOE,
            (
                {"tp": 4},
                {"ep": 4},
                {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
                {"ep": 2, "etp": 2},
                {"tp": 2, "ep": 4, "etp": 1},
            ),
        ),
    )
    for kind in kinds
    for layout in layouts
]


def wide_config(family: str, moe: bool) -> dict:
    """A tiny config whose heads divide by four."""
    config = tiny_config(family, moe=moe)
    text = config if family == "qwen2_5_vl" else config.get("thinker_config", config)["text_config"]
    text["num_attention_heads"], text["num_key_value_heads"] = 8, 4
    if family == "qwen2_5_vl":
        text["hidden_size"] = config["vision_config"]["out_hidden_size"] = 128
        text["vocab_size"] = 608
    return config


def run_layouts(tmp_path: Path, num_processes: int, cases: list) -> None:
    steps = []
    for (family, moe), layout in cases:
        source = tmp_path / f"{family}-{moe}"
        converted = tmp_path / f"{family}-{moe}-converted"
        if not source.exists():
            write_tiny_checkpoint(source, family, moe=moe, init="coded", config=wide_config(family, moe))
            hf_to_megatron(source, converted, Options())
        before = [step["save"] for step in steps if step["hf"] == str(source)]
        steps.append(
            {
                "hf": str(source),
                "layout": layout,
                "save": str(tmp_path / f"saved-{len(steps)}"),
                "load": [str(converted / "release"), *before[-1:]],
            }
        )
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(steps))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
    ]
    result = subprocess.run(
        [*launcher, str(WORKER), str(plan)],
        cwd=REPOSITORY,
        env={
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, "\n".join(
        line for line in result.stderr.splitlines() if not line.startswith("  warnings")
    )[-9000:]
    for index, step in enumerate(steps):
        exported = tmp_path / f"exported-{index}"
        megatron_to_hf(Path(step["save"]), exported, Path(step["hf"]), Options())
        difference = filecmp.dircmp(step["hf"], exported)
        assert not difference.left_only + difference.right_only, step
        _, wrong, failed = filecmp.cmpfiles(step["hf"], exported, difference.common_files, shallow=False)
        assert not wrong + failed, (step["layout"], wrong)


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(DENSE, id="dense"),
        pytest.param(MOE, id="moe"),
    ],
)
@pytest.mark.slow
def test_two_processes_round_trip_bit_for_bit(tmp_path: Path, kinds: tuple[tuple[str, bool], ...]) -> None:
    run_layouts(tmp_path, 2, [case for case in TWO if case[0] in kinds])


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_four_processes_round_trip_bit_for_bit(tmp_path: Path, moe: bool) -> None:
    run_layouts(tmp_path, 4, [case for case in FOUR if case[0][1] == moe])
