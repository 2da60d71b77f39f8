# SPDX-License-Identifier: Apache-2.0
"""Strict reading of HF ``config.json`` sections: no default for a missing field, all problems in one error.

Two spellings are accepted where transformers 4 and 5 differ; which ones is said by whoever reads.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from models.contract.architecture import MoeArchitecture, TextArchitecture, VisionArchitecture
from models.contract.errors import ConfigError

_ABSENT = object()


class HfSection:
    """One section (a JSON object) of a HF config, with the problems found while reading it.

    Args:
        data: The section.
        where: What to call it in an error, e.g. ``config.json: text_config``.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError("config section is not an object", where=where, got=type(data).__name__)
        self.data, self.where = data, where
        self.problems: list[str] = []

    def section(self, name: str) -> "HfSection":
        """A section inside this one. Raises ConfigError at once: nothing can be read without it."""
        if name not in self.data:
            raise ConfigError(
                f"config has no '{name}'", where=self.where, expected=f"an object '{name}'",
                got=f"keys {', '.join(sorted(self.data))}", fix="use the checkpoint's own config.json",
            )  # fmt: skip
        return HfSection(self.data[name], f"{self.where}: {name}")

    def integer(self, *names: str) -> int:
        """The first of `names` that is present, as an int."""
        return self._read(
            names, lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer", 0
        )

    def number(self, *names: str) -> float:
        """The first of `names` that is present, as a float."""
        value = self._read(
            names, lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number", 0
        )
        return float(value)

    def boolean(self, *names: str) -> bool:
        """The first of `names` that is present, as a bool."""
        return self._read(names, lambda value: isinstance(value, bool), "true or false", False)

    def text(self, *names: str) -> str:
        """The first of `names` that is present, as a string."""
        return self._read(names, lambda value: isinstance(value, str), "a string", "")

    def integers(self, *names: str) -> tuple[int, ...]:
        """The first of `names` that is present, as a tuple of ints."""
        return tuple(self._read(names, _is_integer_list, "a list of integers", ()))

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.data.get(name) is not None

    def require(self, name: str, value: Any) -> None:
        """Note a problem unless the field is absent or equals `value`: anything else is not implemented."""
        got = self.data.get(name, value)
        if got != value:
            self.problems.append(f"{name} = {got!r} is not supported (only {value!r})")

    def check(self, *sections: "HfSection") -> None:
        """Raise one ConfigError with the problems of this section and the others."""
        found = [f"{part.where}: {problem}" for part in (self, *sections) for problem in part.problems]
        if found:
            raise ConfigError(
                f"{len(found)} problem(s) in the HF config", where=self.where, got="; ".join(found),
                fix="use the checkpoint's own config.json, complete",
            )  # fmt: skip

    def _read(self, names: tuple[str, ...], is_valid: Callable[[Any], bool], kind: str, stand_in: Any) -> Any:
        for name in names:
            value = self.data.get(name, _ABSENT)
            if value is _ABSENT or value is None:
                continue
            if is_valid(value):
                return value
            self.problems.append(f"'{name}' must be {kind}, is {value!r:.60}")
            return stand_in
        self.problems.append(f"missing field '{' or '.join(names)}'")
        return stand_in


def _is_integer_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)


def read_text(
    text: HfSection, *, tied: bool, add_qkv_bias: bool, qk_layernorm: bool, mrope_interleaved: bool
) -> TextArchitecture:
    """Decoder sizes. transformers 4 keeps rope in `rope_scaling` + `rope_theta`, 5 in `rope_parameters`.

    Args:
        text: The section with the decoder's fields (for a flat config, the whole file).
        tied: Whether the output layer is the embedding; decided by the top level, see the families.
        add_qkv_bias: Whether q, k and v have a bias.
        qk_layernorm: Whether q and k are normalised per head.
        mrope_interleaved: The family's layout of rotary frequencies; a config that says otherwise is refused.

    Returns: The architecture. Problems are left in `text` (and raised by its `check`).
    """
    rope = HfSection(
        text.data.get("rope_parameters") or text.data.get("rope_scaling") or {}, f"{text.where}: rope"
    )
    theta = rope.number("rope_theta") if rope.has("rope_theta") else text.number("rope_theta")
    section = rope.integers("mrope_section")
    rope.require("mrope_interleaved", mrope_interleaved)
    text.require("hidden_act", "silu")
    text.require("use_sliding_window", False)
    heads, hidden = text.integer("num_attention_heads"), text.integer("hidden_size")
    head_dim = text.integer("head_dim") if text.has("head_dim") else hidden // max(heads, 1)
    if len(section) != 3 or sum(section) * 2 != head_dim:
        rope.problems.append(
            f"mrope_section {list(section)} must be three numbers that sum to head_dim / 2 = {head_dim / 2:g}"
        )
    architecture = TextArchitecture(
        num_layers=text.integer("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=text.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=text.integer("num_key_value_heads"),
        kv_channels=head_dim,
        vocab_size=text.integer("vocab_size"),
        rotary_base=theta,
        mrope_section=(section[0], section[1], section[2]) if len(section) == 3 else (0, 0, 0),
        mrope_interleaved=mrope_interleaved,
        layernorm_epsilon=text.number("rms_norm_eps"),
        add_qkv_bias=add_qkv_bias,
        qk_layernorm=qk_layernorm,
        max_position_embeddings=text.integer("max_position_embeddings"),
        tie_word_embeddings=tied,
        moe=read_moe(text) if text.has("moe_intermediate_size") else None,
    )
    text.problems += [f"rope: {problem}" for problem in rope.problems]
    return architecture


def read_moe(text: HfSection) -> MoeArchitecture:
    """Experts of the decoder. transformers 5 writes `num_local_experts` for Qwen3-VL-MoE."""
    num_layers, step = text.integer("num_hidden_layers"), text.integer("decoder_sparse_step")
    mlp_only = text.integers("mlp_only_layers")
    dense = tuple(layer for layer in range(num_layers) if layer in mlp_only or (layer + 1) % max(step, 1))
    # transformers 5 drops the field where the router always renormalises (Qwen3-VL-MoE).
    text.require("norm_topk_prob", True)
    return MoeArchitecture(
        num_experts=text.integer("num_experts", "num_local_experts"),
        topk=text.integer("num_experts_per_tok"),
        ffn_hidden_size=text.integer("moe_intermediate_size"),
        aux_loss_coeff=text.number("router_aux_loss_coef"),
        dense_layers=dense,
    )


def read_interpolated_vision(vision: HfSection) -> VisionArchitecture:
    """Vision tower with an interpolated position table and deepstack, as Qwen3-VL and Qwen3-Omni have it."""
    depth, deepstack = vision.integer("depth"), vision.integers("deepstack_visual_indexes")
    if any(index not in range(depth) for index in deepstack):
        vision.problems.append(f"deepstack_visual_indexes {list(deepstack)} must lie in 0..{depth - 1}")
    if vision.has("num_position_embeddings"):
        positions = vision.integer("num_position_embeddings")
    else:  # published Qwen3-Omni files give the side of the table as image_size / patch_size
        positions = (vision.integer("image_size") // max(vision.integer("patch_size"), 1)) ** 2
    if math.isqrt(max(positions, 0)) ** 2 != positions:
        vision.problems.append(f"num_position_embeddings {positions} must be a perfect square")
    return VisionArchitecture(
        num_layers=depth,
        hidden_size=vision.integer("hidden_size"),
        ffn_hidden_size=vision.integer("intermediate_size"),
        num_attention_heads=vision.integer("num_heads"),
        patch_size=vision.integer("patch_size", "spatial_patch_size"),
        temporal_patch_size=vision.integer("temporal_patch_size"),
        spatial_merge_size=vision.integer("spatial_merge_size"),
        in_channels=vision.integer("in_channels", "in_chans"),
        out_hidden_size=vision.integer("out_hidden_size"),
        hidden_act=vision.text("hidden_act"),
        gated_linear_unit=False,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,  # transformers: fixed in Qwen3VLVisionBlock, not in the config
        patch_embed_bias=True,
        num_position_embeddings=positions,
        deepstack_visual_indexes=deepstack,
    )
