# SPDX-License-Identifier: Apache-2.0
"""The probe of this host, the check of a claim against it, and the environment fingerprint.

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
from typing import Any

from harness.devices import Kind, classify, hardware_class
from models.contract.errors import EnvironmentMismatch

REPOSITORY = Path(__file__).resolve().parents[1]


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
    "CUDA_SCALE_LAUNCH_QUEUES",
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
