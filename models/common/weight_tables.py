# SPDX-License-Identifier: Apache-2.0
"""Parts of weight tables that families share: the decoder, the vision tower with a position table. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix

from models.common.weight_rules import (
    ExpertLayout,
    Shape,
    WeightRule,
    concatenate,
    copy,
    experts,
    fused_heads,
    query_groups,
)
from models.contract.architecture import MoeArchitecture, TextArchitecture, VisionArchitecture
from models.contract.errors import WeightMappingError


@dataclass(frozen=True, slots=True, kw_only=True)
class NameLayout:
    """Where a checkpoint keeps its parts: prefixes with the trailing dot, and how experts are stored."""

    text: str
    vision: str
    lm_head: str
    experts: ExpertLayout = "fused"

    @property
    def root(self) -> str:
        """What all names of the trained model begin with: `thinker.`, or nothing."""
        return commonprefix([self.text, self.vision, self.lm_head])  # noqa: RUF071 - names, not paths

    def __str__(self) -> str:
        return f"decoder at {self.text}*, vision at {self.vision}*, experts {self.experts}"


def decoder_rules(text: TextArchitecture, layout: NameLayout) -> tuple[WeightRule, ...]:
    """Embedding, decoder layers, final norm and output layer."""
    embedding = copy(
        "language_model.embedding.word_embeddings.weight",
        f"{layout.text}embed_tokens.weight",
        (text.vocab_size, text.hidden_size),
        pads_rows=True,
        copies=(layout.lm_head,) if text.tie_word_embeddings else (),
    )
    final_norm = copy(
        "language_model.decoder.final_layernorm.weight", f"{layout.text}norm.weight", (text.hidden_size,)
    )
    rules = [embedding]
    for layer in range(text.num_layers):
        rules += decoder_layer_rules(text, layout, layer)
    rules.append(final_norm)
    if not text.tie_word_embeddings:
        shape = (text.vocab_size, text.hidden_size)
        rules.append(copy("language_model.output_layer.weight", layout.lm_head, shape, pads_rows=True))
    return tuple(rules)


def decoder_layer_rules(text: TextArchitecture, layout: NameLayout, layer: int) -> list[WeightRule]:
    """One decoder layer."""
    key, name = f"language_model.decoder.layers.{layer}", f"{layout.text}layers.{layer}"
    width, hidden = text.num_attention_heads * text.kv_channels, text.hidden_size
    attention, qkv = f"{name}.self_attn", f"{key}.self_attention.linear_qkv"
    rules = [copy(f"{qkv}.layer_norm_weight", f"{name}.input_layernorm.weight", (hidden,))]
    kinds: tuple[tuple[str, Shape], ...] = (("weight", (hidden,)), ("bias", ()))
    for kind, inner in kinds if text.add_qkv_bias else kinds[:1]:
        rules.append(
            query_groups(
                f"{qkv}.{kind}",
                (f"{attention}.q_proj.{kind}", f"{attention}.k_proj.{kind}", f"{attention}.v_proj.{kind}"),
                num_heads=text.num_attention_heads,
                num_groups=text.num_query_groups,
                head_dim=text.kv_channels,
                inner=inner,
            )
        )
    rules.append(
        copy(f"{key}.self_attention.linear_proj.weight", f"{attention}.o_proj.weight", (hidden, width))
    )
    if text.qk_layernorm:
        for part in "qk":
            rules.append(
                copy(
                    f"{key}.self_attention.{part}_layernorm.weight",
                    f"{attention}.{part}_norm.weight",
                    (text.kv_channels,),
                )
            )
    if text.moe is None or layer in text.moe.dense_layers:
        return rules + _dense_mlp_rules(text, key, name)
    return rules + _moe_rules(text, text.moe, key, name, layout.experts)


def _dense_mlp_rules(text: TextArchitecture, key: str, name: str) -> list[WeightRule]:
    hidden, ffn = text.hidden_size, text.ffn_hidden_size
    return [
        copy(f"{key}.mlp.linear_fc1.layer_norm_weight", f"{name}.post_attention_layernorm.weight", (hidden,)),
        concatenate(
            f"{key}.mlp.linear_fc1.weight",
            ((f"{name}.mlp.gate_proj.weight", ffn), (f"{name}.mlp.up_proj.weight", ffn)),
            (hidden,),
        ),
        copy(f"{key}.mlp.linear_fc2.weight", f"{name}.mlp.down_proj.weight", (hidden, ffn)),
    ]


def _moe_rules(
    text: TextArchitecture, moe: MoeArchitecture, key: str, name: str, layout: ExpertLayout
) -> list[WeightRule]:
    hidden, count, ffn = text.hidden_size, moe.num_experts, moe.ffn_hidden_size
    prefix, target = f"{name}.mlp.experts.", f"{key}.mlp.experts.experts"
    return [
        copy(f"{key}.pre_mlp_layernorm.weight", f"{name}.post_attention_layernorm.weight", (hidden,)),
        copy(f"{key}.mlp.router.weight", f"{name}.mlp.gate.weight", (count, hidden)),
        experts(
            f"{target}.linear_fc1.weight", prefix, ("gate_proj", "up_proj"), "gate_up_proj",
            layout=layout, num_experts=count, out_features=ffn, in_features=hidden,
        ),
        experts(
            f"{target}.linear_fc2.weight", prefix, ("down_proj",), "down_proj",
            layout=layout, num_experts=count, out_features=hidden, in_features=ffn,
        ),
    ]  # fmt: skip


def vision_attention_rules(vision: VisionArchitecture, key: str, name: str) -> list[WeightRule]:
    """Attention of one vision block with its norm: fused qkv with bias, output projection with bias."""
    hidden, heads = vision.hidden_size, vision.num_attention_heads
    qkv = f"{key}.self_attention.linear_qkv"
    rules = norm_rules(
        f"{qkv}.layer_norm_", f"{name}.norm1.", hidden, bias=vision.normalization == "LayerNorm"
    )
    kinds: tuple[tuple[str, Shape], ...] = (("weight", (hidden,)), ("bias", ()))
    for kind, inner in kinds:
        head_dim = hidden // heads
        rules.append(
            fused_heads(
                f"{qkv}.{kind}", f"{name}.attn.qkv.{kind}", num_heads=heads, head_dim=head_dim, inner=inner
            )
        )
    return rules + linear_rules(f"{key}.self_attention.linear_proj", f"{name}.attn.proj", (hidden, hidden))


def interpolated_vision_rules(
    vision: VisionArchitecture, prefix: str, *, norm: str, fc1: str, fc2: str, deepstack: str
) -> tuple[WeightRule, ...]:
    """Vision tower of Qwen3-VL and Qwen3-Omni; the mergers' names differ between the two.

    Args:
        vision: Sizes.
        prefix: HF prefix of the tower, with the trailing dot.
        norm: HF name of a merger's norm.
        fc1: HF name of a merger's first linear.
        fc2: HF name of a merger's second linear.
        deepstack: HF name of the list of deepstack mergers.
    """
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    merged = hidden * vision.spatial_merge_size**2
    rules = [*patch_embed_rules(vision, prefix)]
    if vision.num_position_embeddings is not None:
        shape = (vision.num_position_embeddings, hidden)
        rules.append(copy("vision_model.position_embedding.weight", f"{prefix}pos_embed.weight", shape))
    for layer in range(vision.num_layers):
        key, name = f"vision_model.layers.{layer}", f"{prefix}blocks.{layer}"
        rules += vision_attention_rules(vision, key, name)
        rules += norm_rules(f"{key}.mlp.linear_fc1.layer_norm_", f"{name}.norm2.", hidden, bias=True)
        rules += linear_rules(f"{key}.mlp.linear_fc1", f"{name}.mlp.linear_fc1", (ffn, hidden))
        rules += linear_rules(f"{key}.mlp.linear_fc2", f"{name}.mlp.linear_fc2", (hidden, ffn))
    mergers = [("vision_model.merger", f"{prefix}merger", hidden)]  # normalises before the patches are merged
    for index in range(len(vision.deepstack_visual_indexes)):  # these normalise after
        mergers.append((f"vision_model.deepstack_mergers.{index}", f"{prefix}{deepstack}.{index}", merged))
    for key, name, normalised in mergers:
        rules += norm_rules(f"{key}.norm.", f"{name}.{norm}.", normalised, bias=True)
        rules += linear_rules(f"{key}.linear_fc1", f"{name}.{fc1}", (merged, merged))
        rules += linear_rules(f"{key}.linear_fc2", f"{name}.{fc2}", (vision.out_hidden_size, merged))
    return tuple(rules)


def patch_embed_rules(vision: VisionArchitecture, prefix: str) -> list[WeightRule]:
    """The patch embedding: a convolution on disk, a linear layer over flattened (c, t, h, w) patches in Megatron."""
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    name = f"{prefix}patch_embed.proj"
    rules = [
        copy("vision_model.patch_embed.weight", f"{name}.weight", (vision.hidden_size, *patch), view="flat")
    ]
    if vision.patch_embed_bias:
        rules.append(copy("vision_model.patch_embed.bias", f"{name}.bias", (vision.hidden_size,)))
    return rules


def linear_rules(key: str, name: str, shape: tuple[int, int]) -> list[WeightRule]:
    """A linear layer with bias, copied."""
    return [copy(f"{key}.weight", f"{name}.weight", shape), copy(f"{key}.bias", f"{name}.bias", shape[:1])]


def norm_rules(key: str, name: str, size: int, *, bias: bool) -> list[WeightRule]:
    """A norm, copied; `key` and `name` end just before `weight`."""
    return [
        copy(f"{key}{kind}", f"{name}{kind}", (size,))
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def detect_prefix(names: Mapping[str, Shape], choices: tuple[str, ...], probe: str, *, what: str) -> str:
    """The one prefix of `choices` under which `probe` exists.

    Raises:
        WeightMappingError: none or several do: the checkpoint is of another family, or holds two models.
    """
    found = [prefix for prefix in choices if prefix + probe in names]
    if len(found) != 1:
        raise WeightMappingError(
            f"cannot tell where the {what} is" if not found else f"the {what} is there more than once",
            where=what,
            expected="one of " + ", ".join(prefix + probe for prefix in choices),
            got=", ".join(prefix + probe for prefix in found) or f"none of them among {len(names)} tensors",
            fix="check that config.json and the safetensors files belong together, and that the folder is complete",
        )
    return found[0]


def detect_experts(
    names: Mapping[str, Shape], text: TextArchitecture, prefix: str, *, told: ExpertLayout | None = None
) -> ExpertLayout:
    """How experts are stored, decided by names and shapes in the file.

    Args:
        names: Shapes of the checkpoint's tensors.
        text: Sizes; a dense decoder has no experts and yields `fused`.
        prefix: HF prefix of the decoder.
        told: What the user says; needed where both fused layouts have the same shape.

    Raises:
        WeightMappingError: shapes fit no layout, fit both and nothing was told, or contradict what was told.
    """
    moe = text.moe
    if moe is None:
        return "fused"
    layer = next(index for index in range(text.num_layers) if index not in moe.dense_layers)
    base = f"{prefix}layers.{layer}.mlp.experts."
    E, H, I = moe.num_experts, text.hidden_size, moe.ffn_hidden_size  # noqa: E741 - as in the formulas
    up, down = names.get(f"{base}gate_up_proj"), names.get(f"{base}down_proj")
    fits: list[ExpertLayout] = []
    if (up, down) == ((E, H, 2 * I), (E, I, H)):
        fits.append("fused")
    if (up, down) == ((E, 2 * I, H), (E, H, I)):
        fits.append("fused_transposed")
    if names.get(f"{base}0.gate_proj.weight") == (I, H):
        fits.append("per_expert")
    tie = up is not None and (H in (I, 2 * I))
    where = f"{base}gate_up_proj"
    if told is not None and (told in fits or tie):
        return told
    if told is not None or not fits:
        raise WeightMappingError(
            "experts are not stored as expected", where=where,
            expected=told or f"[E={E}, H={H}, 2I={2 * I}], its transpose, or one tensor for each expert",
            got=f"gate_up_proj {up}, down_proj {down}", fix="check that config.json belongs to these files",
        )  # fmt: skip
    if tie:
        # With H = 2I (or H = I) one of the two tensors has the same shape either way, and a mixed reading is silent.
        raise WeightMappingError(
            "the layout of the experts cannot be told from their shapes", where=where,
            expected="an explicit layout, because hidden_size is I or 2I", got=f"H = {H}, I = {I}",
            fix="pass --expert-layout fused (as on the hub) or fused_transposed (as transformers 5 saves)",
        )  # fmt: skip
    return fits[0]
