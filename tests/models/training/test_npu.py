# SPDX-License-Identifier: Apache-2.0
"""The NPU path of the FSDP2 engine on a stand-in: nothing here has run on Ascend hardware.

The stand-in is a package called torch_npu that registers a device as the real one does. It computes nothing: what is
tested is what is asked of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = """
import torch
CALLS = []
class Npu:
    @staticmethod
    def is_available(): return True
    @staticmethod
    def device_count(): return 2
    @staticmethod
    def set_device(index): CALLS.append(("set_device", index))
    @staticmethod
    def get_device_name(device): return "Ascend910B"
    @staticmethod
    def get_device_properties(device): return type("Properties", (), {"total_memory": 64 * 2**30})()
    @staticmethod
    def max_memory_allocated(device): return 7
    @staticmethod
    def get_rng_state(): return torch.zeros(3, dtype=torch.uint8)
    @staticmethod
    def set_rng_state(state): CALLS.append(("set_rng_state", state.tolist()))
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", Npu)
"""
PROGRAM = """
import json, sys
import torch
from torch import distributed
from models.contract.errors import ConfigError
from models.contract.recipe import parse_recipe
from models.training import parallel, processes, random_state
from models.training.environment import describe_hardware, peak_memory_bytes
from models.contract.launcher import LauncherEnvironment
started = []
distributed.init_process_group = lambda backend, **options: started.append((backend, sorted(options)))
distributed.new_group = lambda **options: started.append(("group", options["backend"]))
recipe = parse_recipe({
    "name": "npu", "num_processes": 2, "model": {"family": "qwen3_vl", "checkpoint": "c"},
    "data": {"dataset": "d", "seq_length": 16}, "optimizer": {"lr": 1e-3},
    "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 2, "engine": "fsdp2"},
}, where="test")
launcher = LauncherEnvironment(rank=1, world_size=2, local_rank=1, is_launched=True)
ranks = parallel.start_data_parallel(recipe, launcher, timeout_s=5.0)
random_state.restore(random_state.capture(ranks.device), ranks.device)
try:
    processes.pick_device(2)
    refused = ""
except ConfigError as error:
    refused = str(error)
hardware = describe_hardware(ranks.device)
print(json.dumps({
    "device": str(ranks.device), "started": started, "calls": sys.modules["torch_npu"].CALLS, "refused": refused,
    "hardware": [hardware["kind"], hardware["device_name"], hardware["device_count"], hardware["memory_bytes"]],
    "peak": peak_memory_bytes(ranks.device), "dp": [ranks.dp_rank, ranks.dp_size],
}))
"""


@pytest.mark.slow
def test_npu_is_found_when_torch_npu_is_importable(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(STAND_IN)
    repository = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "npu:1"
    assert found["started"] == [["hccl", ["timeout"]], ["group", "gloo"]]
    assert found["calls"][0] == ["set_device", 1]
    assert ["set_rng_state", [0, 0, 0]] in found["calls"]
    assert found["hardware"] == ["npu", "Ascend910B", 2, 64 * 2**30]
    assert (found["peak"], found["dp"]) == (7, [1, 2])
    assert "more processes than devices" in found["refused"]
