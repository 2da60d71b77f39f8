# SPDX-License-Identifier: Apache-2.0
"""The reference scripts' arguments, and the recipe they stand for. Torch-free.

``run_mcore_qwen.sh`` takes 24 positional arguments for Qwen2.5-VL and 26 for Qwen3-VL (expert tensor and expert
parallel sizes come after context parallel); the lite and debug scripts take none. What has no effect in the scripts
has none here, and what the scripts get wrong takes the checkpoint's value; both are said in the recipe's notes.
"""

from collections.abc import Sequence
from typing import Any

from models.contract.errors import ConfigError
from models.contract.recipe import Recipe, load_recipe, parse_recipe
from models.contract.site import REPOSITORY

COMMON = (
    "ENV", "MODEL_SIZE", "BATCH_SIZE", "GLOBAL_BATCH_SIZE", "LR", "MIN_LR", "SEQ_LEN", "PAD_LEN",
    "PR", "TP", "PP", "CP",
)  # fmt: skip
TAIL = (
    "SP", "DO", "FL", "AC", "OPTIMIZER_OFFLOAD", "SAVE_INTERVAL", "DATASET_PATH", "VALID_DATASET_PATH",
    "PRETRAIN_CHECKPOINT_PATH", "TRAIN_ITERS", "LR_WARMUP_ITERS", "OUTPUT_BASEPATH",
)  # fmt: skip
ARGUMENTS = {"qwen2_5_vl": COMMON + TAIL, "qwen3_vl": (*COMMON, "ETP", "EP", *TAIL)}
SIZES = {"qwen2_5_vl": ("3B", "7B", "32B", "72B"), "qwen3_vl": ("2B", "4B", "8B", "32B", "A3B", "A22B")}
TITLES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
MOE_SIZES = ("A3B", "A22B")
WITHOUT_ARGUMENTS = {
    "run_mcore_qwen3_vl_lite": "convergence/qwen3_vl_30b_a3b_lite.toml",
    "run_mcore_qwen3_omni": "convergence/qwen3_omni_30b_a3b_lite.toml",
    "debug_mcore_qwen3_vl": "debug/qwen3_vl_30b_a3b_debug.toml",
    "debug_mcore_qwen3_omni": "debug/qwen3_omni_30b_a3b_debug.toml",
}
"""Scripts that take no arguments, and the shipped recipe each stands for."""
PROCESSES_PER_NODE = 8
EVAL_INTERVAL, EVAL_ITERS = 1000, 10
"""What the script passes to Megatron, in iterations and global batches; Megatron evaluates once more at the end."""


def script_recipe(script: str, arguments: Sequence[str], *, num_processes: int | None = None) -> Recipe:
    """The recipe that a call of one of the scripts stands for.

    Args:
        script: Name of the script, with or without ``.sh``.
        arguments: Its positional arguments.
        num_processes: Devices of the job, which the script takes from its machine; default: the fewest multiple of
            one node of eight that the layout divides.

    Raises:
        ConfigError: unknown script, wrong number of arguments, or a value the script would not take.
    """
    name = script.removesuffix(".sh").rpartition("/")[2]
    if name in WITHOUT_ARGUMENTS:
        if arguments:
            raise ConfigError(
                f"{name} takes no arguments", got=f"{len(arguments)}: {' '.join(arguments)[:200]}"
            )
        return load_recipe(REPOSITORY / "suites" / WITHOUT_ARGUMENTS[name])
    if name != "run_mcore_qwen":
        known = ", ".join(["run_mcore_qwen", *WITHOUT_ARGUMENTS])
        raise ConfigError("unknown script", expected=f"one of {known}", got=script)
    family = next((family for family, names in ARGUMENTS.items() if len(names) == len(arguments)), None)
    if family is None:
        raise ConfigError(
            "wrong number of arguments for run_mcore_qwen", expected="24 (Qwen2.5-VL) or 26 (Qwen3-VL)",
            got=str(len(arguments)), fix="count again: Qwen3-VL's script takes ETP and EP after CP",
        )  # fmt: skip
    given = dict(zip(ARGUMENTS[family], arguments, strict=True))
    return parse_recipe(_recipe_data(family, given, num_processes), where=f"{name} {' '.join(arguments)}")


def recipe_toml(recipe: Recipe) -> str:
    """A recipe as TOML text that `load_recipe` reads back; values at their defaults are left out."""
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    top = {key: value for key, value in data.items() if not isinstance(value, dict)}
    lines = ["# SPDX-License-Identifier: Apache-2.0", *_rows(top)]
    for section, values in data.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *_rows(values)]
    return "\n".join(lines) + "\n"


def _recipe_data(family: str, given: dict[str, str], num_processes: int | None) -> dict[str, Any]:
    size = _size(family, given)
    env = _choice(given, "ENV", ("dsw", "dlc"))
    precision = _choice(given, "PR", ("fp16", "bf16", "fp8"))
    tp, pp, cp = (_integer(given, key) for key in ("TP", "PP", "CP"))
    batch_size = _integer(given, "GLOBAL_BATCH_SIZE")
    is_moe = size in MOE_SIZES
    ep, etp = (_integer(given, "EP"), _integer(given, "ETP")) if is_moe else (1, None)
    iterations, warmup = _integer(given, "TRAIN_ITERS"), _integer(given, "LR_WARMUP_ITERS", least=0)
    if warmup >= iterations:
        raise ConfigError(
            "argument LR_WARMUP_ITERS leaves nothing to decay", expected=f"less than TRAIN_ITERS = {iterations}",
            got=str(warmup), fix="the script ends the decay at TRAIN_ITERS - LR_WARMUP_ITERS",
        )  # fmt: skip
    seq_length, pad_length = _integer(given, "SEQ_LEN"), _integer(given, "PAD_LEN")
    processes = num_processes or _fewest_processes(tp * pp * cp, ep * (etp or 1) * pp)
    notes = [
        "Loss is the mean over samples, the prompt holds no question and images are resized as in the reference.",
        "Checkpoints hold weights only, as the script's --no-save-optim says.",
        "FL picked flash or fused attention by hand; TransformerEngine picks here.",
    ]
    if family == "qwen3_vl":
        notes.append(
            "The script gives the vision tower the decoder's SiLU; here it has the checkpoint's tanh-GELU."
        )
    if is_moe:
        notes.append(
            "The script's rotary base for A3B is 1e6; this recipe takes the checkpoint's, as all other sizes."
        )
    if pad_length != seq_length:
        notes.append(
            f"SEQ_LEN {seq_length} only named shapes and rates; sequences are padded to PAD_LEN {pad_length}."
        )
    if given["OPTIMIZER_OFFLOAD"] != "false":
        notes.append(
            "OPTIMIZER_OFFLOAD switches the distributed optimizer on and offloads nothing, as in the script."
        )
    if _is_true(given, "SP") and tp == 1:
        notes.append("SP has no effect without tensor parallel.")
    if given["AC"] == "offload":
        notes.append("AC offload (activations to the CPU) has no counterpart; nothing is recomputed.")
    overlap = _is_true(given, "DO") or given["OPTIMIZER_OFFLOAD"] != "false"
    return {
        "name": f"{family}_{size.lower()}_run_mcore_qwen",
        "description": f"run_mcore_qwen.sh {env} {size}, sequence {pad_length}.",
        "notes": notes,
        "num_processes": processes,
        "hardware": ["h20", "h100", "h200"],
        "model": {
            "family": family, "checkpoint": given["PRETRAIN_CHECKPOINT_PATH"], "attention_backend": "te",
        },
        "data": {
            "dataset": given["DATASET_PATH"], "eval_dataset": given["VALID_DATASET_PATH"],
            "seq_length": pad_length, "loss_mask": "vqa_reference", "preprocessing": "reference", "num_workers": 8,
        },
        "train": {
            "train_iters": iterations, "micro_batch_size": _integer(given, "BATCH_SIZE"),
            "global_batch_size": batch_size, "loss_reduction": "per_sample",
            "eval_interval": EVAL_INTERVAL, "eval_samples": EVAL_ITERS * batch_size,
        },
        "optimizer": {
            "lr": _number(given, "LR"), "min_lr": _number(given, "MIN_LR"), "lr_warmup_iters": warmup,
            "lr_decay_iters": iterations - warmup, "use_distributed_optimizer": overlap,
        },
        "parallel": {
            "tensor_model_parallel_size": tp, "sequence_parallel": _is_true(given, "SP") and tp > 1,
            "pipeline_model_parallel_size": pp, "context_parallel_size": cp,
            "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp,
            "overlap_grad_reduce": True, "overlap_param_gather": overlap,
        },
        "precision": {
            "dtype": "fp16" if precision == "fp16" else "bf16", "fp8": "delayed" if precision == "fp8" else None,
            "recompute": {"full": "full", "sel": "selective"}.get(given["AC"], "none"),
        },
        "checkpoint": {"save_interval": _integer(given, "SAVE_INTERVAL"), "save_optimizer": False},
    }  # fmt: skip


def _fewest_processes(dense: int, expert: int) -> int:
    count = PROCESSES_PER_NODE
    while count % dense or count % expert:
        count += PROCESSES_PER_NODE
        if count > 100_000:
            raise ConfigError("no number of whole nodes fits this layout", got=f"tp*pp*cp = {dense}")
    return count


def _size(family: str, given: dict[str, str]) -> str:
    size = given["MODEL_SIZE"]
    other = next(name for name in SIZES if name != family)
    if size in SIZES[other] and size not in SIZES[family]:
        count, theirs = len(ARGUMENTS[family]), len(ARGUMENTS[other])
        raise ConfigError(
            f"{size} is a size of {TITLES[other]}", where="argument MODEL_SIZE",
            expected=f"{theirs} arguments for {TITLES[other]}, with ETP and EP after CP for Qwen3-VL alone",
            got=f"{count}, as for {TITLES[family]}",
            fix="count again; the published argument table of Qwen3-VL leaves ETP and EP out, its example has them",
        )  # fmt: skip
    return _choice(given, "MODEL_SIZE", SIZES[family])


def _integer(given: dict[str, str], key: str, *, least: int = 1) -> int:
    text = given[key]
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"argument {key} is not a whole number of at least {least}", got=text)
    return int(text)


def _number(given: dict[str, str], key: str) -> float:
    try:
        return float(given[key])
    except ValueError:
        raise ConfigError(f"argument {key} is not a number", got=given[key]) from None


def _choice(given: dict[str, str], key: str, choices: Sequence[str]) -> str:
    if given[key] not in choices:
        raise ConfigError(f"argument {key} is unknown", expected=", ".join(choices), got=given[key])
    return given[key]


def _is_true(given: dict[str, str], key: str) -> bool:
    return _choice(given, key, ("true", "false")) == "true"


def _rows(values: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(_rows(value)) + " }"
    return repr(value)
