# SPDX-License-Identifier: Apache-2.0
"""How much memory a training run takes on one device, from sizes alone. Torch-free.

An estimate for planning: weights, gradients and optimizer states are counted exactly as Megatron shards them;
activations are the tensors that a layer keeps for its backward pass with a fused attention, which never stores the
square of scores. Fragmentation and communication buffers are one allowance.
"""

from dataclasses import dataclass

from models.contract.architecture import Architecture, TextArchitecture, VisionArchitecture
from models.contract.fixed_shapes import merged_tokens
from models.contract.recipe import OWN_FP8, Recipe

GIB = 1024**3
RUNTIME_BYTES = 3 * GIB
"""CUDA context, NCCL buffers and library workspaces of one process."""
FRAGMENTATION = 0.05
"""Share of the rest that the allocator cannot use."""
VISION_TOKENS_PER_ROW = 1024
"""Merged vision tokens that a row is assumed to hold at most, unless `max_pixels` says less: a 900 x 900 picture."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of the whole model by part; experts apart, since they are sharded differently."""

    language: int
    experts: int
    embedding: int
    """Input table and, when untied, output layer."""
    vision: int
    audio: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.language + self.experts + self.embedding + self.vision + self.audio


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """With runtime and fragmentation."""
        used = self.weights + self.gradients + self.optimizer + self.activations + self.logits
        return used * (1 + FRAGMENTATION) + RUNTIME_BYTES


def count_parameters(architecture: Architecture, *, num_layers: int | None = None) -> ParameterCounts:
    """Parameters of a model, from its sizes."""
    text = architecture.text
    layers = num_layers or text.num_layers
    queries, keys = text.num_attention_heads * text.kv_channels, text.num_query_groups * text.kv_channels
    attention = text.hidden_size * (2 * queries + 2 * keys) + 2 * text.hidden_size
    attention += (queries + 2 * keys) * text.add_qkv_bias + 2 * text.kv_channels * text.qk_layernorm
    num_moe = 0 if text.moe is None else layers - sum(1 for layer in text.moe.dense_layers if layer < layers)
    dense = (layers - num_moe) * 3 * text.hidden_size * text.ffn_hidden_size
    experts = routers = 0
    if text.moe is not None:
        experts = num_moe * text.moe.num_experts * 3 * text.hidden_size * text.moe.ffn_hidden_size
        routers = num_moe * text.moe.num_experts * text.hidden_size
    tables = 1 if text.tie_word_embeddings else 2
    return ParameterCounts(
        language=layers * attention + dense + routers + text.hidden_size,
        experts=experts,
        embedding=tables * text.vocab_size * text.hidden_size,
        vision=_vision_parameters(architecture.vision),
        audio=_audio_parameters(architecture),
    )


def estimate_memory(recipe: Recipe, architecture: Architecture) -> MemoryEstimate:
    """Memory on the fullest device: the first pipeline stage, which holds the towers and the most micro-batches."""
    counts = count_parameters(architecture, num_layers=recipe.model.num_layers)
    parallel, precision, optimizer = recipe.parallel, recipe.precision, recipe.optimizer
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    etp = parallel.expert_tensor_size
    experts = counts.experts / pp / (parallel.expert_model_parallel_size * etp)
    tables = (
        counts.embedding
        if pp == 1
        else counts.embedding / (1 if architecture.text.tie_word_embeddings else 2)
    )
    vision = counts.vision / tp
    language = counts.language / pp / tp + tables / tp
    dense = language + vision + counts.audio
    frozen = set(recipe.model.freeze)
    trained_dense = (language if "language" not in frozen else 0) + (vision if "vision" not in frozen else 0)
    trained_dense += counts.audio if "audio" not in frozen else 0
    trained_experts = experts if "language" not in frozen else 0
    width = BYTES[precision.dtype]
    gradient = 4 if precision.grad_reduce_in_fp32 or precision.dtype == "fp32" else width
    # fp32 main copy and two fp32 moments; precision-aware: 2 bytes that complete bf16, and two bf16 moments. What
    # offloading leaves on the device is in fp32 all the same.
    has_short_states = optimizer.use_precision_aware_optimizer and optimizer.cpu_offload_fraction == 0
    state = 6 if has_short_states else 8 + (0 if precision.dtype == "fp32" else 4)
    state *= 1 - optimizer.cpu_offload_fraction
    shards = recipe.num_processes // (tp * pp) if optimizer.use_distributed_optimizer else 1
    expert_ranks = recipe.num_processes // (parallel.expert_model_parallel_size * etp * pp)
    expert_shards = max(1, expert_ranks) if optimizer.use_distributed_optimizer else 1
    if recipe.train.engine == "fsdp2":
        return _fsdp2(recipe, architecture, dense + experts, trained_dense + trained_experts)
    # the decoder's matrices once more, and once transposed
    rounded = 0.0 if precision.fp8 is None else 2 * (counts.language / pp / tp + experts)
    return MemoryEstimate(
        weights=(dense + experts) * width + rounded,
        gradients=(trained_dense + trained_experts) * gradient,
        optimizer=(trained_dense / shards + trained_experts / expert_shards) * state,
        activations=_activations(recipe, architecture),
        logits=_logits(recipe, architecture.text),
    )


def _fsdp2(recipe: Recipe, architecture: Architecture, parameters: float, trained: float) -> MemoryEstimate:
    """Everything is cut over all ranks in fp32; two layers, and the root with its tables, are whole at a time."""
    width = BYTES[recipe.precision.dtype]
    layers = recipe.model.num_layers or architecture.text.num_layers
    counts = count_parameters(architecture, num_layers=recipe.model.num_layers)
    whole = 2 * (counts.language + counts.experts) / layers + counts.embedding
    on_device = 0.0 if recipe.optimizer.cpu_offload_fraction > 0 else 1.0
    return MemoryEstimate(
        weights=on_device * parameters / recipe.num_processes * 4 + whole * width,
        gradients=on_device * trained / recipe.num_processes * 4,
        optimizer=on_device * trained / recipe.num_processes * 8,
        activations=_activations(recipe, architecture),
        logits=_logits(recipe, architecture.text),
    )


def _activations(recipe: Recipe, architecture: Architecture) -> float:
    parallel, text = recipe.parallel, architecture.text
    pp, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    width = BYTES[recipe.precision.dtype]
    tokens = recipe.train.micro_batch_size * recipe.data.seq_length / parallel.context_parallel_size
    shared = 1 / tp if parallel.sequence_parallel else 1.0
    ffn = text.ffn_hidden_size if text.moe is None else text.moe.ffn_hidden_size * text.moe.topk
    # inputs of two norms; q, k, v and the attention's output; gate and up
    states = 2 * text.hidden_size * shared + _attention_width(text) / tp + 2 * ffn / tp
    # inputs of linear layers: after the norms, and after the activation
    normed, product = 2 * text.hidden_size * shared, ffn / tp
    if recipe.precision.recompute == "selective" and _recomputes_activation(recipe, text):
        normed, product = 0.0 if text.moe is None else normed, 0.0
    operands = width * (normed + product)
    if recipe.precision.fp8 is not None:  # one byte each, and the attention's output in both formats
        operands = normed + product + text.num_attention_heads * text.kv_channels / tp
    layer = tokens * (width * states + operands)
    layers = (recipe.model.num_layers or text.num_layers) / pp
    in_flight = min(pp, recipe.num_microbatches)
    if recipe.precision.recompute == "full":
        kept = width * tokens * text.hidden_size * shared
        language = layers * in_flight * kept / recipe.precision.recompute_num_layers
        language += layer * recipe.precision.recompute_num_layers
    else:
        language = layers * in_flight * layer
    return language + in_flight * _vision_activations(recipe, architecture.vision)


def _attention_width(text: TextArchitecture) -> int:
    """What attention keeps of a position: q, k, v and its output, and what norms of heads were given."""
    queries, keys = text.num_attention_heads * text.kv_channels, text.num_query_groups * text.kv_channels
    return 2 * queries + 2 * keys + (queries + 2 * keys) * text.qk_layernorm


def _has_own_kernels(recipe: Recipe) -> bool:
    """`auto` is TransformerEngine's backend, which has them, until a machine without it says `torch`."""
    return recipe.model.attention_backend != "torch" and recipe.train.engine == "megatron"


def _recomputes_activation(recipe: Recipe, text: TextArchitecture) -> bool:
    """Whether selective recompute reaches norms and activation (dense) or the activation (experts).

    Elsewhere it is the attention core's: see :class:`models.common.dense_layer.DenseLayer`.
    """
    if not _has_own_kernels(recipe):
        return False
    fp8 = recipe.precision.fp8
    if text.moe is not None:
        return fp8 != "delayed"
    return (fp8 is None or fp8 in OWN_FP8) and recipe.parallel.tensor_model_parallel_size == 1


def _vision_activations(recipe: Recipe, vision: VisionArchitecture) -> float:
    """Of the pictures of one micro-batch: those that a recipe states, or else at most half of its positions."""
    if "vision" in recipe.model.freeze:
        return 0.0
    tokens = min(recipe.data.seq_length / 2, VISION_TOKENS_PER_ROW)
    if recipe.data.fixed_shapes is not None:
        shapes = recipe.data.fixed_shapes
        tokens = shapes.images * merged_tokens(vision, shapes.image_size)
    patches = recipe.train.micro_batch_size * tokens * vision.spatial_merge_size**2
    if recipe.data.max_pixels is not None:
        patches = min(patches, recipe.train.micro_batch_size * recipe.data.max_pixels / vision.patch_size**2)
    width, tp = BYTES[recipe.precision.dtype], recipe.parallel.tensor_model_parallel_size
    matrices = 3 if vision.gated_linear_unit else 2
    inner = 4 * vision.hidden_size + matrices * vision.ffn_hidden_size
    layer = width * patches * (4 * vision.hidden_size + inner / tp)
    if recipe.precision.recompute_vision:
        return vision.num_layers * width * patches * vision.hidden_size + layer
    return vision.num_layers * layer


def _logits(recipe: Recipe, text: TextArchitecture) -> float:
    """Logits in the model's format and the gradient of the output layer's weight before it is added to the others.

    Our own loss turns logits into their gradient in place; torch's keeps them, their fp32 copy, and the gradient.
    """
    tokens = recipe.train.micro_batch_size * recipe.data.seq_length / recipe.parallel.context_parallel_size
    width = BYTES[recipe.precision.dtype]
    kept = (tokens + text.hidden_size) * width if _has_own_kernels(recipe) else tokens * (2 * width + 4)
    return kept * text.vocab_size / recipe.parallel.tensor_model_parallel_size


def _vision_parameters(vision: VisionArchitecture) -> int:
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    matrices = 3 if vision.gated_linear_unit else 2
    norm = hidden if vision.normalization == "RMSNorm" else 2 * hidden
    mlp = matrices * hidden * ffn + (matrices - 1) * ffn + hidden
    layer = 4 * hidden * hidden + 4 * hidden + mlp + 2 * norm
    merged = hidden * vision.spatial_merge_size**2
    merger = merged * merged + merged + merged * vision.out_hidden_size + vision.out_hidden_size
    deepstack_norm = merged if vision.normalization == "RMSNorm" else 2 * merged
    patch = vision.patch_dim * hidden + hidden * vision.patch_embed_bias
    table = (vision.num_position_embeddings or 0) * hidden
    mergers = merger + norm + len(vision.deepstack_visual_indexes) * (merger + deepstack_norm)
    return vision.num_layers * layer + patch + table + mergers


def _audio_parameters(architecture: Architecture) -> int:
    audio = architecture.audio
    if audio is None:
        return 0
    hidden, channels = audio.hidden_size, audio.downsample_hidden_size
    layer = 4 * hidden * hidden + 4 * hidden + 2 * hidden * audio.ffn_hidden_size + audio.ffn_hidden_size
    layer += hidden + 4 * hidden
    width = audio.num_mel_bins
    for _ in range(3):
        width = (width - 1) // 2 + 1
    convolutions = 9 * channels + channels + 2 * (9 * channels * channels + channels)
    ends = channels * width * hidden + 2 * hidden + hidden * hidden + hidden
    return audio.num_layers * layer + convolutions + ends + hidden * audio.output_dim + audio.output_dim
