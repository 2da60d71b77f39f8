# SPDX-License-Identifier: Apache-2.0
"""The hardware table: device classes with their dense peaks, and which class a device name belongs to. Pure data."""

import re
from dataclasses import dataclass
from typing import Literal

from models.contract.errors import ConfigError

Kind = Literal["cpu", "cuda", "npu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareClass:
    """One row of the hardware table."""

    name: str
    title: str
    kind: Kind
    pattern: str
    """Regular expression on the device name the driver reports, case-insensitive; the first row that fits wins."""
    bf16_tflops: float | None
    """Dense bf16 peak of one device, TFLOP/s, without sparsity; None means no utilisation is computed."""
    fp8_tflops: float | None
    """Dense fp8 peak, TFLOP/s; None where the device has no fp8."""
    memory_gib: float | None
    """Memory of one device as sold, GB; the probe reports what is really there."""
    source: str


# The order matters: "H200" and "H20" both start with "H20", GH200 carries an H200-class GPU with another memory.
_ROWS = (
    HardwareClass(
        name="h200",
        title="NVIDIA H200",
        kind="cuda",
        pattern=r"\bH200\b(?!.*NVL)",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        memory_gib=141,
        # 1,979 and 3,958 with sparsity, halved
        source="NVIDIA H200 datasheet, SXM column",
    ),
    HardwareClass(
        name="h20",
        title="NVIDIA H20",
        kind="cuda",
        pattern=r"\bH20(-3e)?\b",
        bf16_tflops=148.0,
        fp8_tflops=296.0,
        memory_gib=96,
        # the H20-3e has 141 GB and the same peaks
        source="NVIDIA H20 product brief (148 bf16, 296 fp8, both dense)",
    ),
    HardwareClass(
        name="h800",
        title="NVIDIA H800",
        kind="cuda",
        pattern=r"\bH800\b",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        memory_gib=80,
        # H100's arithmetic with 400 GB/s NVLink and cut-down fp64
        source="NVIDIA H800 datasheet, SXM column",
    ),
    HardwareClass(
        name="h100",
        title="NVIDIA H100 SXM",
        kind="cuda",
        pattern=r"\bH100\b(?!.*(PCIe|NVL))",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        memory_gib=80,
        # PCIe (756) and NVL (835) boards are other machines: they are not in this class
        source="NVIDIA H100 datasheet, SXM5 column",
    ),
    HardwareClass(
        name="a100",
        title="NVIDIA A100",
        kind="cuda",
        pattern=r"\bA100\b",
        bf16_tflops=312.0,
        fp8_tflops=None,
        memory_gib=80,
        # the 40 GB board has the same peak
        source="NVIDIA A100 datasheet",
    ),
    HardwareClass(
        name="b200",
        title="NVIDIA B200",
        kind="cuda",
        pattern=r"(?<!G)\bB200\b",
        bf16_tflops=2250.0,
        fp8_tflops=4500.0,
        memory_gib=180,
        # HGX B200: 36 PFLOP/s bf16 and 72 PFLOP/s fp8 for eight, with sparsity
        source="NVIDIA HGX B200 datasheet",
    ),
    HardwareClass(
        name="npu_a3",
        title="Ascend 910C (Atlas A3), one die",
        kind="npu",
        pattern=r"910_?93|910C",
        bf16_tflops=376.0,
        fp8_tflops=None,
        memory_gib=64,
        # 752 for the two dies of a package; the driver lists dies
        source="CloudMatrix384 paper, arXiv 2506.12708, section on the Ascend 910C",
    ),
    HardwareClass(
        name="npu_a2",
        title="Ascend 910B (Atlas A2)",
        kind="npu",
        pattern=r"910B",
        bf16_tflops=None,
        fp8_tflops=None,
        memory_gib=64,
        # sold in bins between 280 and 400 under names the driver does not tell apart reliably: no utilisation
        source="no single published dense peak",
    ),
    HardwareClass(
        name="cpu",
        title="CPU",
        kind="cpu",
        pattern=r"(?!)",
        bf16_tflops=None,
        fp8_tflops=None,
        memory_gib=None,
        source="not comparable across machines: no utilisation",
    ),
)
HARDWARE: dict[str, HardwareClass] = {row.name: row for row in _ROWS}
"""Hardware classes by the name that markers, recipes and baselines use."""


def classify(device_name: str) -> str | None:
    """Hardware class of a device name as the driver reports it; None when no row fits."""
    for row in _ROWS:
        if re.search(row.pattern, device_name, re.IGNORECASE):
            return row.name
    return None


def hardware_class(name: str) -> HardwareClass:
    """Row of the table. Raises ConfigError for a name that is not in it."""
    if name not in HARDWARE:
        raise ConfigError(
            f"unknown hardware class '{name}'",
            expected=f"one of {', '.join(HARDWARE)}",
            got=name,
            fix="use a class of the table, or add a row to harness/devices.py",
        )
    return HARDWARE[name]
