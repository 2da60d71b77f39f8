# SPDX-License-Identifier: Apache-2.0
import pytest

from harness.devices import HARDWARE, classify, hardware_class
from harness.hardware import Probe, check_claim, parse_npu_smi, probe_host
from models.contract.errors import ConfigError, EnvironmentMismatch

H20 = Probe(kind="cuda", device_name="NVIDIA H20", device_count=8, memory_bytes=96 * 2**30)
LAPTOP = Probe(
    kind="cpu", device_name="some CPU", device_count=0, memory_bytes=2**34, cpu_model="some CPU", num_cores=2
)

NPU_SMI = """\
+--------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc3                 Version: 24.1.rc3                                         |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 92.5        44                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3161 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | 90.1        43                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3162 / 65536         |
+===========================+===============+====================================================+
"""


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA H20", "h20"),
        ("NVIDIA H20-3e", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H800", "h800"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A1000", None),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", None),
        ("NVIDIA GH200 480GB", None),
        ("Ascend 910B3", "npu_a2"),
        ("Ascend910_9392", "npu_a3"),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_classify_names_what_the_driver_reports(device_name: str, expected: str | None) -> None:
    assert classify(device_name) == expected


def test_peaks_are_dense() -> None:
    # The sparse figures are twice these; H20's 148 is what rules it out for the published 561 TFLOP/s log.
    dense = {"h20": 148.0, "h100": 989.4, "h800": 989.4, "h200": 989.4, "a100": 312.0, "b200": 2250.0}
    assert {name: HARDWARE[name].bf16_tflops for name in dense} == dense
    assert all(
        row.fp8_tflops in (None, 2 * (row.bf16_tflops or 0)) or row.name.startswith("h")
        for row in HARDWARE.values()
    )


def test_check_claim_refuses_another_machine() -> None:
    with pytest.raises(EnvironmentMismatch, match="h20 was asked for") as caught:
        check_claim("h20", LAPTOP)
    assert caught.value.expected == "NVIDIA H20"
    assert "2 cores of some CPU" in caught.value.got
    with pytest.raises(EnvironmentMismatch):
        check_claim("h200", H20)


def test_check_claim_refuses_too_few_devices() -> None:
    check_claim("h20", H20, num_devices=8)
    with pytest.raises(EnvironmentMismatch, match="needs 16 devices and this host has 8"):
        check_claim("h20", H20, num_devices=16)


def test_check_claim_takes_cpu_cases_everywhere() -> None:
    check_claim("cpu", H20, num_devices=4)
    check_claim("cpu", LAPTOP)


def test_hardware_class_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown hardware class 'h2o'") as caught:
        hardware_class("h2o")
    assert "h20" in caught.value.expected


def test_parse_npu_smi_reads_name_count_and_memory() -> None:
    assert parse_npu_smi(NPU_SMI) == {
        "kind": "npu", "device_name": "Ascend 910B3", "device_count": 2, "memory_bytes": 65536 * 2**20,
        "driver": "24.1.rc3",
    }  # fmt: skip
    assert parse_npu_smi("") is None


def test_probe_host_describes_this_machine() -> None:
    probe = probe_host()
    assert probe.num_cores >= 1
    assert probe.has("cpu")
    assert probe.to_dict()["hardware"] == probe.hardware
