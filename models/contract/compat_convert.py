# SPDX-License-Identifier: Apache-2.0
"""Other projects' conversion commands, and the native command each stands for. Torch-free.

``run_8xH20.sh`` takes seven positional arguments; ``mm-convert`` takes a converter, a method and flags. Parallel sizes
in either have no counterpart: a converted checkpoint loads at any layout.
"""

from collections.abc import Sequence

from models.contract.errors import ConfigError

RUN_ARGUMENTS = ("MODEL_SIZE", "LOAD_DIR", "SAVE_DIR", "MG2HF", "USE_CUDA", "PR", "HF_DIR")
PRECISIONS = ("fp32", "bf16", "fp16")
DCP_CONVERTERS = {
    "Qwen3VLConverter": "2025",
    "GenericDCPConverter": "2026",
    "ExpertMergeDcpConverter": "2025",
}
"""Converters that write DCP, and how they name tensors where no flag says otherwise."""
LEGACY_CONVERTERS = (
    "Qwen3VLMegatronConverter",
    "Qwen2_5_VLConverter",
    "Qwen2VLConverter",
    "Qwen2_5_OmniConverter",
)
MM_FLAGS = (
    "hf_dir",
    "dcp_dir",
    "load_dir",
    "save_dir",
    "model_assets_dir",
    "tie_weight",
    "tie_weight_mapping",
    "dcp_prefix",
    "hf_prefix",
    "fused_linear_names",
    "trust_remote_code",
)
NO_COUNTERPART = ("hf_prefix", "fused_linear_names")
"""Flags that must be left empty: names and fused tensors are told by the checkpoint itself."""
PREFIX_STYLES = {"": "2026", "model.": "2025"}
"""Style for a value of `--dcp_prefix`."""


def run_8xh20(arguments: Sequence[str]) -> list[str]:
    """The native arguments (after ``convert``) of a call of ``run_8xH20.sh``.

    The script ignores its precision (it always passes bf16); here it counts.

    Raises:
        ConfigError: wrong number of arguments, or a value that the script would not take.
    """
    if len(arguments) not in (6, 7):
        raise ConfigError(
            "wrong number of arguments", where="run_8xH20", expected=" ".join(RUN_ARGUMENTS),
            got=f"{len(arguments)}: {' '.join(arguments)[:200]}",
        )  # fmt: skip
    given: dict[str, str] = dict(zip(RUN_ARGUMENTS, arguments, strict=False))
    for key in ("MG2HF", "USE_CUDA"):
        _choice(given, key, ("true", "false"))
    dtype = _choice(given, "PR", PRECISIONS)
    if given["MG2HF"] == "false":
        return ["hf-to-megatron", given["LOAD_DIR"], given["SAVE_DIR"], "--dtype", dtype]
    if not given.get("HF_DIR"):
        raise ConfigError(
            "HF_DIR is missing",
            where="run_8xH20, seventh argument",
            expected="the HF checkpoint that training started from",
            fix="give it: export takes names and config from it",
        )
    return ["megatron-to-hf", given["LOAD_DIR"], given["SAVE_DIR"], "--hf", given["HF_DIR"], "--dtype", dtype]


def mm_convert(arguments: Sequence[str]) -> list[str]:
    """The native arguments (after ``convert``) of a call of MindSpeed-MM's ``mm-convert``.

    Raises:
        ConfigError: a converter, method or flag without a counterpart, or a missing directory.
    """
    if len(arguments) < 2:
        raise ConfigError(
            "wrong number of arguments", where="mm-convert", expected="CONVERTER METHOD --FLAG VALUE …"
        )
    converter, method = arguments[:2]
    if converter in LEGACY_CONVERTERS:
        raise ConfigError(
            "this converter writes one file for each rank of one layout", where=f"mm-convert {converter}",
            expected=", ".join(DCP_CONVERTERS),
            fix="use `convert hf-to-megatron` or `megatron-to-hf`: the result loads at any layout, nothing to resplit",
        )  # fmt: skip
    if converter not in DCP_CONVERTERS or method not in ("hf_to_dcp", "dcp_to_hf"):
        raise ConfigError(
            "unknown converter or method", where="mm-convert", got=f"{converter} {method}",
            expected=f"{', '.join(DCP_CONVERTERS)} with hf_to_dcp or dcp_to_hf",
        )  # fmt: skip
    flags = _flags(arguments[2:])
    for name in NO_COUNTERPART:
        if flags.get(name, "") not in ("", "[]", "null"):
            raise ConfigError(
                "a flag has no counterpart", where=f"mm-convert --{name}", got=flags[name],
                fix="leave it out: names and layout are told by the checkpoint",
            )  # fmt: skip
    if method == "hf_to_dcp":
        merges = converter == "ExpertMergeDcpConverter"
        target = "save_dir" if merges else "dcp_dir"
        style = DCP_CONVERTERS[converter]
        if "dcp_prefix" in flags:
            style = PREFIX_STYLES[_choice(flags, "dcp_prefix", tuple(PREFIX_STYLES))]
        tied = ["--tie-weight"] if _is_tied(flags) else []
        merged = ["--merge-experts"] if merges else []
        return [
            "hf-to-dcp",
            _needed(flags, "hf_dir"),
            _needed(flags, target),
            "--style",
            style,
            *tied,
            *merged,
        ]
    merged = converter == "ExpertMergeDcpConverter"
    source, template = ("dcp_dir", "hf_dir") if merged else ("load_dir", "model_assets_dir")
    return ["dcp-to-hf", _needed(flags, source), _needed(flags, "save_dir"), "--hf", _needed(flags, template)]


def _is_tied(flags: dict[str, str]) -> bool:
    """Whether a tied output layer is asked for: by the flag of 2025, or by naming it in the mapping of 2026."""
    mapping = flags.get("tie_weight_mapping", "")
    if mapping not in ("", "{}", "null") and "lm_head.weight" not in mapping:
        raise ConfigError(
            "no such tie", where="mm-convert --tie_weight_mapping", expected="lm_head.weight", got=mapping
        )
    tied = flags.get("tie_weight", "false").lower()
    return (
        _choice({"--tie_weight": tied}, "--tie_weight", ("true", "false")) == "true" or "lm_head" in mapping
    )


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value`` as a dictionary."""
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in MM_FLAGS:
            known = ", ".join(f"--{flag}" for flag in MM_FLAGS)
            raise ConfigError("unknown flag", where="mm-convert", expected=known, got=name)
        if not equals:
            if not rest:
                raise ConfigError("a flag has no value", where=f"mm-convert {name}")
            value = rest.pop(0)
        flags[name[2:]] = value
    return flags


def _needed(flags: dict[str, str], name: str) -> str:
    if not flags.get(name):
        raise ConfigError("a flag is missing", where="mm-convert", expected=f"--{name}")
    return flags[name]


def _choice(given: dict[str, str], key: str, choices: Sequence[str]) -> str:
    if given[key] not in choices:
        raise ConfigError(
            "wrong value", where=key, expected=" or ".join(repr(c) for c in choices), got=given[key]
        )
    return given[key]
