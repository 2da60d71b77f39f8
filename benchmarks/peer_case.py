# SPDX-License-Identifier: Apache-2.0
"""What one row of `benchmarks.gpu_peer` compares: a published size, perhaps cut, and one micro-batch. Torch-free."""

import copy
import re
from dataclasses import dataclass
from typing import Any

from models.contract.errors import ConfigError
from models.contract.families import published_config

SEQ_LENGTH = 8192
FORM = r"(?P<model>\w+):(?P<num_images>\d+)x(?P<image_size>\d+)(?P<options>(:(layers|samples)=[1-9]\d*)*)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCase:
    """One row: the same model and the same micro-batch for every side."""

    model: str
    """Published size, see ``models/contract/published``."""
    num_images: int
    image_size: int
    """Side of the square images in pixels."""
    num_layers: int = 0
    """Keep the first so many decoder layers; 0 keeps all."""
    num_samples: int = 1
    """Equal samples that the row packs."""

    def hf_config(self) -> dict[str, Any]:
        """The parsed ``config.json`` that every side is built from."""
        config = published_config(self.model)
        return cut_config(config, self.num_layers) if self.num_layers else config

    def describe(self) -> dict[str, Any]:
        """The first fields of the row."""
        cut = {"layers": self.num_layers} if self.num_layers else {}
        packed = {"samples": self.num_samples} if self.num_samples > 1 else {}
        images = f"{self.num_images}x{self.image_size}"
        return {"model": self.model, "images": images, "seq_length": SEQ_LENGTH} | cut | packed


def parse_case(argument: str) -> PeerCase:
    """Read a case of the command line, such as ``qwen3_vl_30b_a3b:8x448:layers=12:samples=8``.

    Raises:
        ConfigError: it has another form, or names an option twice.
    """
    found = re.fullmatch(FORM, argument, flags=re.ASCII)
    options = [] if found is None else [one.split("=") for one in found["options"].split(":")[1:]]
    values = {name: int(number) for name, number in options}
    if found is None or len(values) < len(options):
        raise ConfigError(
            "a case cannot be read",
            where="command line of benchmarks.gpu_peer",
            expected="SIZE:IMAGESxSIDE, then perhaps :layers=N and :samples=N",
            got=argument,
            fix="write it like qwen3_vl_30b_a3b:8x448:layers=12:samples=8",
        )
    return PeerCase(
        model=found["model"], num_images=int(found["num_images"]), image_size=int(found["image_size"]),
        num_layers=values.get("layers", 0), num_samples=values.get("samples", 1),
    )  # fmt: skip


def cut_config(hf_config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The same config with only the first decoder layers, and what it lists by layer cut with them.

    Raises:
        ConfigError: the model has fewer layers.
    """
    config = copy.deepcopy(hf_config)
    whole = config.get("thinker_config", config)
    text = whole.get("text_config", whole)  # Qwen2.5-VL's stands in the file itself
    if num_layers > text["num_hidden_layers"]:
        raise ConfigError(
            "a model cannot be cut to more layers than it has",
            where="command line of benchmarks.gpu_peer",
            expected=f"layers up to {text['num_hidden_layers']}",
            got=f"layers={num_layers}",
            fix="name fewer layers, or leave the option out",
        )
    text["num_hidden_layers"] = num_layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:num_layers]
    if "mlp_only_layers" in text:
        text["mlp_only_layers"] = [index for index in text["mlp_only_layers"] if index < num_layers]
    return config
