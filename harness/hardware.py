# SPDX-License-Identifier: Apache-2.0
"""Hardware classes with their dense peaks, the probe of this host, and the environment fingerprint.

Torch-free: NVIDIA devices are read through NVML, Ascend devices through ``npu-smi``, the host through psutil. The probe
decides what a machine is; a marker or option only claims it, and :func:`check_claim` compares the two.
"""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from models.contract.errors import ConfigError, EnvironmentMismatch

Kind = Literal["cpu", "cuda", "npu"]

REPOSITORY = Path(__file__).resolve().parents[1]


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

FINGERPRINT_PACKAGES = (
    "torch",
    "torchvision",
    "megatron-core",
    "megatron-energon",
    "transformers",
    "transformer-engine",
    "safetensors",
    "tokenizers",
    "numpy",
    "pandas",
    "scipy",
    "statsmodels",
    "arch",
    "pydantic",
    "triton",
)
FINGERPRINT_VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVTE_FUSED_ATTN",
    "NVTE_FLASH_ATTN",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_NCCL_AVOID_RECORD_STREAMS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What this host really has."""

    kind: Kind
    device_name: str
    device_count: int
    memory_bytes: int
    """Memory of one device; of the host on a CPU."""
    driver: str = ""
    cpu_model: str = ""
    num_cores: int = 0
    """Cores this process may use."""
    host_memory_bytes: int = 0

    @property
    def hardware(self) -> str | None:
        """Class of the accelerator, None when it is not in the table; `cpu` without an accelerator."""
        return "cpu" if self.kind == "cpu" else classify(self.device_name)

    def has(self, hardware: str) -> bool:
        """Whether cases of this class can run here. Every host has a CPU."""
        return hardware == "cpu" or hardware == self.hardware

    def describe(self) -> str:
        """One phrase for messages."""
        if self.kind == "cpu":
            return f"no accelerator, {self.num_cores} cores of {self.cpu_model}"
        return f"{self.device_count} x {self.device_name} (class {self.hardware or 'unknown'})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the class."""
        return {**asdict(self), "hardware": self.hardware}


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
            fix="use a class of the table, or add a row to harness/hardware.py",
        )
    return HARDWARE[name]


@functools.cache
def probe_host() -> Probe:
    """Look at this host once: NVIDIA devices first, then Ascend, else its CPU."""
    import psutil

    host = {
        "cpu_model": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": psutil.virtual_memory().total,
    }
    found = _probe_nvidia() or _probe_ascend()
    if found is None:
        return Probe(
            kind="cpu",
            device_name=host["cpu_model"],
            device_count=0,
            memory_bytes=host["host_memory_bytes"],
            **host,
        )
    return Probe(**found, **host)


def check_claim(hardware: str, probe: Probe, *, num_devices: int = 1) -> None:
    """Compare a claimed class with the probe.

    Raises:
        ConfigError: the class is not in the table.
        EnvironmentMismatch: this host is another class, or has fewer devices than the case needs.
    """
    row = hardware_class(hardware)
    if not probe.has(hardware):
        raise EnvironmentMismatch(
            f"{hardware} was asked for and this host is not one",
            expected=row.title,
            got=probe.describe(),
            fix=f"run on a {row.title} host, or ask for another class",
        )
    if row.kind != "cpu" and probe.device_count < num_devices:
        raise EnvironmentMismatch(
            f"the case needs {num_devices} devices and this host has {probe.device_count}",
            expected=f"{num_devices} x {row.title}",
            got=probe.describe(),
            fix="run on a larger host",
        )


def environment_fingerprint(probe: Probe | None = None) -> dict[str, str]:
    """What may move numbers between two machines, as flat text: versions, commit, driver, variables."""
    probe = probe or probe_host()
    rows = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_model": probe.cpu_model,
        "num_cores": str(probe.num_cores),
        "device": f"{probe.device_count} x {probe.device_name}" if probe.device_count else "none",
        "driver": probe.driver,
        **git_state(),
    }
    rows |= {f"package.{name}": version for name in FINGERPRINT_PACKAGES if (version := _version(name))}
    rows |= {f"env.{name}": os.environ[name] for name in FINGERPRINT_VARIABLES if name in os.environ}
    return rows


def git_state(repository: Path = REPOSITORY) -> dict[str, str]:
    """Commit of the working tree and whether it has changes; empty outside a repository."""
    commit = _output(["git", "-C", str(repository), "rev-parse", "HEAD"])
    if not commit:
        return {}
    changes = _output(["git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": "yes" if changes else "no"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    # /proc first: py-cpuinfo starts a process and takes most of a second.
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    import cpuinfo

    return str(cpuinfo.get_cpu_info().get("brand_raw", platform.machine()))


def _probe_nvidia() -> dict[str, Any] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no library: not an NVIDIA host
        return None
    try:
        count = pynvml.nvmlDeviceGetCount()
        if not count:
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "kind": "cuda",
            "device_name": _text(pynvml.nvmlDeviceGetName(handle)),
            "device_count": count,
            "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
        }
    finally:
        pynvml.nvmlShutdown()


def _probe_ascend() -> dict[str, Any] | None:
    if not shutil.which("npu-smi"):
        return None
    return parse_npu_smi(_output(["npu-smi", "info"]))


def parse_npu_smi(text: str) -> dict[str, Any] | None:
    """Read the table of ``npu-smi info``; None when it lists no device.

    Each device has two rows: name and health, then chip, bus and memory. The memory column holds `used / total` in MB,
    HBM last.
    """
    names = re.findall(r"^\|\s*\d+\s+(9\d\d\S*|Ascend\S*)\s*\|", text, re.MULTILINE)
    totals = re.findall(r"(\d+)\s*/\s*(\d+)\s*\|\s*$", text, re.MULTILINE)
    if not names:
        return None
    version = re.search(r"npu-smi\s+(\S+)", text)
    # The first digits of the last column are the pages row when there is one: the largest total is the HBM.
    memory_mb = max((int(total) for _, total in totals), default=0)
    return {
        "kind": "npu",
        "device_name": f"Ascend {names[0].removeprefix('Ascend')}",
        "device_count": len(names),
        "memory_bytes": memory_mb * 2**20,
        "driver": version.group(1) if version else "",
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _output(command: list[str]) -> str:
    """Standard output of a short command; empty when it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
