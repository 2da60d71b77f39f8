# SPDX-License-Identifier: Apache-2.0
"""Recipes: TOML in, strict and frozen settings out, one hash for what was resolved.

A recipe says *what* is trained and *how*. It never holds a path of this machine: checkpoints and datasets are
named, and a :class:`models.contract.site.Site` says where they are. Architecture sizes come from the checkpoint.
"""

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.contract.architecture import Family
from models.contract.errors import ConfigError

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
FIXED_SHAPES = "fixed-shapes"
"""What `data.dataset` says where no dataset is read, see :class:`FixedShapes`."""
OWN_FP8 = ("tensorwise", "blockwise")
"""Ways of `precision.fp8` that our own layers round in; others stay with TransformerEngine's modules."""


class ModelSection(BaseModel):
    """Which model, and from where its weights come."""

    model_config = STRICT
    family: Family
    checkpoint: str
    """Name (looked up in the site) or path of a HF checkpoint folder: config, tokenizer, processor, weights."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """`random` keeps the folder's config and tokenizer and draws the weights from `train.seed`."""
    num_layers: int | None = Field(default=None, ge=1)
    """Cut the decoder to its first layers (debug runs)."""
    attention_backend: Literal["auto", "te", "torch"] = "auto"
    experts_backend: Literal["auto", "te", "grouped"] = "auto"
    """`grouped`: all experts of a layer in one launch, in bf16 on one rank of expert tensor parallelism; `te`: those of
    TransformerEngine; `auto`: the first where it can run."""
    freeze: tuple[Literal["language", "vision", "projector", "audio"], ...] = ()


class FixedShapes(BaseModel):
    """Rows of one stated shape and random content instead of a dataset: for timing, where every step must be alike."""

    model_config = STRICT
    samples: int = Field(ge=1)
    """Samples of a row, all equally long; more than one make a pack and need `packing`."""
    images: int = Field(ge=0)
    """Images of a row, shared evenly over its samples."""
    image_size: int = Field(default=448, ge=1)
    """Side of every image in pixels; they are square."""


class DataSection(BaseModel):
    """Which samples, and how they become sequences."""

    model_config = STRICT
    dataset: str
    """Name (looked up in the site) or path of a prepared energon dataset; `fixed-shapes` with that table."""
    eval_dataset: str | None = None
    """Held-out dataset; None means the `val` split of `dataset`."""
    seq_length: int = Field(ge=16)
    padding: Literal["max_length", "longest"] = "max_length"
    packing: bool = False
    vision_tokens_per_pack: int | None = Field(default=None, ge=1)
    """Most merged vision tokens of one pack; None leaves `seq_length` as the only bound."""
    loss_mask: Literal["assistant", "vqa_reference"] = "assistant"
    preprocessing: Literal["hf", "reference"] = "hf"
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    over_length: Literal["skip", "truncate", "error"] = "skip"
    blank_images: bool = False
    """Control run: media keep their shape and lose their content."""
    num_workers: int = Field(default=0, ge=0)
    shuffle_buffer_size: int = Field(default=100, ge=1)
    max_skipped_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    """Stop the run when a larger share of samples had to be skipped."""
    fixed_shapes: FixedShapes | None = None
    """Train on rows of this shape and read no dataset."""


class TrainSection(BaseModel):
    """Batches, iterations, loss."""

    model_config = STRICT
    train_iters: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    seed: int = 1234
    loss_reduction: Literal["per_token", "per_sample"] = "per_token"
    engine: Literal["megatron", "fsdp2"] = "megatron"
    eval_interval: int | None = Field(default=None, ge=1)
    eval_samples: int = Field(default=0, ge=0)
    log_interval: int = Field(default=1, ge=1)
    non_finite: Literal["stop", "skip"] = "stop"
    manual_gc_interval: int = Field(default=100, ge=0)


class OptimizerSection(BaseModel):
    """AdamW and its schedule."""

    model_config = STRICT
    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_iters: int = Field(default=0, ge=0)
    lr_decay_iters: int | None = Field(default=None, ge=1)
    """Iteration at which `min_lr` is reached; None means `train_iters`. The reference uses train - warmup."""
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = Field(default=1.0, ge=0)
    init_method_std: float = 0.02
    use_distributed_optimizer: bool = True
    use_precision_aware_optimizer: bool = False
    cpu_offload_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    vision_lr_mult: float = Field(default=1.0, ge=0)
    projector_lr_mult: float = Field(default=1.0, ge=0)


class ParallelSection(BaseModel):
    """The layout. `data_parallel_size` follows from the number of processes."""

    model_config = STRICT
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=0)
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=0)
    context_parallel_size: int = Field(default=1, ge=1)
    expert_model_parallel_size: int = Field(default=1, ge=1)
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1)
    moe_token_dispatcher_type: Literal["auto", "alltoall", "allgather"] = "auto"
    """`allgather`: every rank that shares experts gets all tokens once, less to send where there are fewer such ranks
    than experts a token; `auto`: that there, where all are certain to have equally many tokens, else `alltoall`."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def expert_tensor_size(self) -> int:
        """Ranks over which an expert is cut: as many as for other layers where nothing is said."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model, context parallel included."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


class PrecisionSection(BaseModel):
    """Number formats."""

    model_config = STRICT
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    fp8: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] | None = None
    grad_reduce_in_fp32: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    """`selective`: what norms and activations put out (with fused kernels), or attention's scores (torch backend)."""
    recompute_num_layers: int = Field(default=1, ge=1)
    recompute_vision: bool = False


class CheckpointSection(BaseModel):
    """What a run keeps."""

    model_config = STRICT
    save_interval: int | None = Field(default=None, ge=1)
    save_final: bool = True
    keep_last: int = Field(default=2, ge=1)
    save_optimizer: bool = True
    async_save: bool = False
    resharding: Literal["data", "any"] = "data"
    """Layout changes that a resume may take: another data-parallel size only, or any (slower to save)."""


class Recipe(BaseModel):
    """One training run, whole."""

    model_config = STRICT
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    notes: tuple[str, ...] = ()
    """Where this recipe departs from a reference, and why."""
    num_processes: int = Field(default=1, ge=1)
    hardware: tuple[str, ...] = ("cpu",)
    """Hardware classes this case is meant for; becomes pytest markers."""
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.num_processes % self.parallel.model_parallel_size:
            raise ValueError(
                f"num_processes {self.num_processes} is not a multiple of tp*pp*cp "
                f"{self.parallel.model_parallel_size}: change num_processes or [parallel]"
            )
        per_step = self.train.micro_batch_size * self.data_parallel_size
        if self.train.global_batch_size % per_step:
            raise ValueError(
                f"global_batch_size {self.train.global_batch_size} is not a multiple of "
                f"micro_batch_size * data_parallel_size = {per_step}"
            )
        return self

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that see different samples."""
        return self.num_processes // self.parallel.model_parallel_size

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one data-parallel rank in one step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size)

    @property
    def num_eval_microbatches(self) -> int:
        """Micro-batches of one data-parallel rank in one evaluation."""
        return self.train.eval_samples // (self.train.micro_batch_size * self.data_parallel_size)

    @property
    def lr_decay_iters(self) -> int:
        """Iteration at which the schedule reaches `min_lr`."""
        return self.optimizer.lr_decay_iters or self.train.train_iters

    def what_changes_numbers(self) -> dict[str, Any]:
        """Plain data without name, description, notes, the hardware list, logging and what is kept on disk.

        A table or a later key that a recipe leaves out is left out here too: recipes keep the hash they had before
        there was one.
        """
        data = self.model_dump(
            mode="json", exclude={"name", "description", "notes", "hardware", "checkpoint"}
        )
        for key in ("log_interval", "manual_gc_interval"):
            data["train"].pop(key)
        if self.data.fixed_shapes is None:
            data["data"].pop("fixed_shapes")
        if self.model.experts_backend != "grouped":  # `te` was the default before `auto` was
            data["model"].pop("experts_backend")
        # `alltoall` was the default before `auto` was.
        if self.parallel.moe_token_dispatcher_type != "allgather":
            data["parallel"].pop("moe_token_dispatcher_type")
        return data

    def sha(self) -> str:
        """Hash of everything that changes the numbers: 16 hex digits of sha256 over canonical JSON."""
        text = json.dumps(self.what_changes_numbers(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    A recipe may name one parent (`extends = "other.toml"`, relative to itself); its own keys win. A parent
    may not extend further.

    Raises:
        ConfigError: unreadable TOML, unknown keys (with the nearest known one), wrong types or ranges. All
            problems of the file are in one error.
    """
    data = _read_toml(path)
    parent = data.pop("extends", None)
    if parent is not None:
        base = _read_toml(path.parent / str(parent))
        if "extends" in base:
            raise ConfigError(
                "a recipe's parent extends another recipe",
                where=str(path),
                expected="one level of inheritance",
                fix=f"extend {base['extends']} directly",
            )
        data = _merge(base, data)
    return parse_recipe(data, where=str(path))


def parse_recipe(data: dict[str, Any], *, where: str) -> Recipe:
    """Check plain data against :class:`Recipe`. Raises ConfigError naming `where` and every problem."""
    try:
        # Through JSON: strict mode refuses lists for tuples on Python data, and takes them in JSON.
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(
            f"{error.error_count()} problem(s) in the recipe",
            where=where,
            got="; ".join(_describe(problem) for problem in error.errors()),
            fix="edit the keys named above; models/contract/recipe.py says what each key means",
        ) from None


def differences(
    first: dict[str, Any], second: dict[str, Any], first_place: str, second_place: str, prefix: str = ""
) -> list[str]:
    """Keys whose values differ between two plain recipes, one text a key."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, first_place, second_place, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} {first_place}, {b!r} {second_place}")
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("recipe not found", where=str(path), fix="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("recipe is not valid TOML", where=str(path), got=str(error)) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _describe(problem: Any) -> str:
    keys = [str(part) for part in problem["loc"]]
    dotted = ".".join(keys) or "recipe"
    if problem["type"] != "extra_forbidden":
        return f"{dotted}: {problem['msg']} (got {problem['input']!r:.80})" if keys else problem["msg"]
    known = _known_keys(keys[:-1])
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key '{dotted}': {hint}"


def _known_keys(parents: list[str]) -> list[str]:
    model: Any = Recipe
    for part in parents:
        annotation = model.model_fields[part].annotation
        kinds = (annotation, *get_args(annotation))  # a table that may be left out is `Table | None`
        model = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return list(model.model_fields)
