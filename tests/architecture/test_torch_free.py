# SPDX-License-Identifier: Apache-2.0
"""Planning, grading and reporting run on a laptop: none of their modules may load torch, megatron or transformers.

And what runs beside every training loads torch alone: the others take seconds.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "megatron", "transformers", "transformer_engine")
PROGRAM = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
sys.exit("loaded: " + ", ".join(loaded) if loaded else 0)
"""


def torch_free_modules() -> list[str]:
    files = [*REPOSITORY.glob("harness/**/*.py"), *REPOSITORY.glob("models/contract/*.py")]
    files += REPOSITORY.glob("models/qwen*/config.py")
    names = [str(file.relative_to(REPOSITORY).with_suffix("")).replace("/", ".") for file in files]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


def stub_packages(folder: Path) -> None:
    """Stubs, not blocked imports: a guarded `try: import torch` must be seen too."""
    for name in HEAVY:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")


def import_all(
    modules: list[str], folder: Path, heavy: Sequence[str] = HEAVY
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(heavy), *modules],
        env={"PYTHONPATH": f"{folder}:{REPOSITORY}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_torch_free_modules_load_no_heavy_package(tmp_path: Path) -> None:
    stub_packages(tmp_path)
    result = import_all(torch_free_modules(), tmp_path)
    assert result.returncode == 0, result.stderr


def test_torch_free_check_sees_a_heavy_import(tmp_path: Path) -> None:
    stub_packages(tmp_path)
    (tmp_path / "guilty.py").write_text("try:\n    import torch\nexcept ImportError:\n    pass\n")
    result = import_all(["guilty"], tmp_path)
    assert "loaded: torch" in result.stderr


def test_the_sentinel_loads_torch_alone(tmp_path: Path) -> None:
    modules = ["models.entry.sentinel", "models.training.processes", "models.training.device_rates"]
    result = import_all(modules, tmp_path, [name for name in HEAVY if name != "torch"])
    assert result.returncode == 0, result.stderr
