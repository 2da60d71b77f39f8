# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from models.contract.driver import DRIVER_DEFAULTS, set_driver_defaults
from models.contract.site import REPOSITORY

SHOW = """
import os, sys
print(sorted(sys.modules.keys() & {"torch", "megatron"}), os.environ.get("CUDA_SCALE_LAUNCH_QUEUES"))
"""


def test_what_the_user_set_stays() -> None:
    environment = {"CUDA_SCALE_LAUNCH_QUEUES": "2x"}
    set_driver_defaults(environment)
    assert environment == {"CUDA_SCALE_LAUNCH_QUEUES": "2x"}
    set_driver_defaults(empty := {})
    assert empty == DRIVER_DEFAULTS


@pytest.mark.parametrize("first", [
    "import benchmarks",
    "import models.entry.train as t; t.load_recipe = lambda _: sys.exit(exec(SHOW)); t.main()",
])  # fmt: skip
def test_defaults_stand_before_anything_starts_the_driver(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_SCALE_LAUNCH_QUEUES", raising=False)
    code = f"import sys; SHOW = {SHOW!r}; sys.argv[1:] = ['--recipe', 'r', '--run-dir', 'd']; {first}; exec(SHOW)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[] 4x", done.stderr
