# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint to Megatron and back in child processes, and leaves the comparison for the report."""

import json
import shutil
from pathlib import Path
from typing import Any

from harness.assets import run_program
from harness.report.collect import CONVERSION_FILE


def round_trip(
    source: Path, work: Path, artifacts: Path, *, name: str, logits: bool = False
) -> dict[str, Any]:
    """Hugging Face → torch_dist → Hugging Face, compared tensor by tensor.

    Args:
        source: Hugging Face checkpoint folder.
        work: Folder for the two conversions; must not exist, and is removed when the result is equal.
        artifacts: Folder that gets `conversion.json`.
        name: Name of the checkpoint in the report.
        logits: Also run the torch_dist checkpoint beside transformers on a fixed multimodal batch.

    Returns: the content of `conversion.json`: is_equal, num_tensors, num_equal, different, missing, unexpected, …

    Raises:
        RunError: a conversion failed, or the results differ; what the program printed is in the message.
    """
    megatron, back, result = work / "megatron", work / "back", artifacts / CONVERSION_FILE
    work.mkdir(parents=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    run_program(["models.entry.convert", "hf-to-megatron", str(source), str(megatron)])
    run_program(["models.entry.convert", "megatron-to-hf", str(megatron), str(back), "--hf", str(source)])
    run_program(["models.entry.convert", "verify", str(source), str(back), "--out", str(result)])
    data = {**json.loads(result.read_text(encoding="utf-8")), "name": name}
    if logits:
        said = work / "logits.json"
        run_program(
            ["models.entry.convert", "verify", str(source), str(megatron), "--logits", "--out", str(said)]
        )
        data["logits"] = json.loads(said.read_text(encoding="utf-8"))["logits"]
    result.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    return data
