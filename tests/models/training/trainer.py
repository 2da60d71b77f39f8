# SPDX-License-Identifier: Apache-2.0
"""Starts, kills and waits for training runs of several processes; see trainer_server.py."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from models.contract.compat_train import recipe_toml
from models.contract.recipe import Recipe
from models.contract.site import Site

REPOSITORY = Path(__file__).parents[3]
MARK = "QWEN_HARNESS_TEST_FOLDER"
"""Marks every process that a trainer starts."""


class Trainer:
    """Starts runs through trainer_server.py."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.folder = folder
        self.site_file = folder / "site.toml"
        self.site_file.write_text(
            "".join(f'{name} = "{value}"\n' for name, value in site.model_dump().items())
        )
        paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", MARK: str(folder)}
        self._server = subprocess.Popen(
            [
                sys.executable, "-W", "ignore", str(Path(__file__).with_name("trainer_server.py")),
                str(site.checkpoint("tiny-qwen2_5_vl")),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment, cwd=REPOSITORY,
        )  # fmt: skip
        assert self._read() == "ready"

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        assert self._server.stdout is not None
        self._server.stdout.close()
        for (
            process
        ) in psutil.process_iter():  # helpers of ranks that were killed; the launcher sweeps like this too
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == str(self.folder):
                    process.kill()

    def start(self, recipe: Recipe, run: Path, *options: str, fault: str | None = None) -> list[int]:
        file = self.folder / f"{run.name}.toml"
        file.write_text(recipe_toml(recipe))
        arguments = ["--recipe", str(file), "--run-dir", str(run), "--site", str(self.site_file), *options]
        job = {
            "arguments": arguments, "num_processes": recipe.num_processes, "port": free_port(), "fault": fault,
        }  # fmt: skip
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        return self._read()

    def wait(self) -> list[int]:
        """How the ranks ended."""
        return self._read()

    def has_ended_within(self, seconds: float) -> bool:
        assert self._server.stdout is not None
        return bool(select.select([self._server.stdout], [], [], seconds)[0])

    def has_ended_before(self, condition: Callable[[], bool]) -> bool:
        """Wait for the condition; True when the ranks ended without it."""
        while not condition():
            if self.has_ended_within(0.01):
                return True
        return False

    def run(self, recipe: Recipe, run: Path, *options: str) -> float:
        """Train to the end; returns the seconds that it took."""
        began = time.monotonic()
        self.start(recipe, run, *options)
        ended = self.wait()
        assert set(ended) == {0}, run.with_suffix(".rank0.log").read_text()[-2000:]
        return time.monotonic() - began

    def _read(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
