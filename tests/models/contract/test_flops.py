# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from models.contract.architecture import (
    Architecture,
    AudioArchitecture,
    MoeArchitecture,
    SpecialTokens,
    TextArchitecture,
    VisionArchitecture,
)
from models.contract.errors import ConfigError
from models.contract.flops import (
    audio_forward_flops,
    megatron_flops,
    model_flops,
    tflops_per_gpu,
    tokens_per_second_per_gpu,
    vision_forward_flops,
    window_squares,
)


def text(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    vocab: int,
    moe: MoeArchitecture | None = None,
):
    return TextArchitecture(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups,
        ffn_hidden_size=ffn, vocab_size=vocab, kv_channels=128, rotary_base=1e6, mrope_section=(16, 24, 24),
        mrope_interleaved=False, layernorm_epsilon=1e-6, add_qkv_bias=True, qk_layernorm=False,
        max_position_embeddings=128000, tie_word_embeddings=False, moe=moe,
    )  # fmt: skip


def moe(width: int) -> MoeArchitecture:
    return MoeArchitecture(num_experts=128, topk=8, ffn_hidden_size=width, aux_loss_coeff=0.001)


QWEN2_5_VL_7B = text(28, 3584, 28, 4, 18944, 152064)
WINDOWED = VisionArchitecture(
    num_layers=4, hidden_size=20, ffn_hidden_size=28, num_attention_heads=2, patch_size=14, temporal_patch_size=2,
    spatial_merge_size=2, in_channels=3, out_hidden_size=36, hidden_act="silu", gated_linear_unit=True,
    normalization="RMSNorm", layernorm_epsilon=1e-6, patch_embed_bias=False, window_size=112,
    fullatt_block_indexes=(1, 3),
)  # fmt: skip
DEEPSTACK = replace(
    WINDOWED,
    window_size=None,
    fullatt_block_indexes=(),
    gated_linear_unit=False,
    deepstack_visual_indexes=(0, 2),
)
AUDIO = AudioArchitecture(
    num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=2, num_mel_bins=16, downsample_hidden_size=6,
    output_dim=28, n_window=50, n_window_infer=800, conv_chunksize=500, max_source_positions=1500,
)  # fmt: skip
TINY_TEXT = replace(text(2, 36, 4, 2, 52, 600), kv_channels=16)


def model(vision: VisionArchitecture = WINDOWED, audio: AudioArchitecture | None = None) -> Architecture:
    tokens = SpecialTokens(image=1, video=2, vision_start=3, vision_end=4)
    return Architecture(
        family="qwen2_5_vl",
        hf_model_type="qwen2_5_vl",
        text=TINY_TEXT,
        vision=vision,
        tokens=tokens,
        audio=audio,
    )


@pytest.mark.parametrize(
    ("decoder", "gigaflops"),
    [
        pytest.param(text(36, 2048, 16, 2, 11008, 151936), (19.42, 20.33, 22.14, 25.76), id="2.5-vl-3b"),
        pytest.param(QWEN2_5_VL_7B, (43.66, 44.89, 47.35, 52.29), id="2.5-vl-7b"),
        pytest.param(text(64, 5120, 40, 8, 27648, 152064), (195.93, 199.96, 208.01, 224.12), id="2.5-vl-32b"),
        pytest.param(text(80, 8192, 64, 8, 29568, 152064), (436.80, 444.86, 460.96, 493.18), id="2.5-vl-72b"),
        pytest.param(text(36, 2560, 32, 8, 9728, 151936), (25.95, 27.76, 31.38, 38.63), id="3-vl-4b"),
        pytest.param(text(36, 4096, 32, 8, 12288, 151936), (47.22, 49.03, 52.66, 59.90), id="3-vl-8b"),
        pytest.param(
            text(48, 2048, 32, 4, 6144, 151936, moe(768)), (20.59, 23.01, 27.84, 37.50), id="3-vl-30b-a3b"
        ),
        pytest.param(
            text(94, 4096, 64, 4, 12288, 151936, moe(1536)),
            (138.57, 148.04, 166.96, 204.81),
            id="3-vl-235b-a22b",
        ),
    ],
)
def test_megatron_formula_reproduces_the_published_table(
    decoder: TextArchitecture, gigaflops: tuple[float, ...]
) -> None:
    found = [
        megatron_flops(decoder, num_sequences=1, seq_length=s) / s / 1e9 for s in (2048, 4096, 8192, 16384)
    ]
    assert found == pytest.approx(gigaflops, abs=0.0056)  # the table has two decimals


def test_megatron_formula_is_exact() -> None:
    assert megatron_flops(QWEN2_5_VL_7B, num_sequences=1, seq_length=8192) == 47_354_216_448.0 * 8192


@pytest.mark.parametrize(
    ("step_time_ms", "tflops", "tokens"),
    [(5533.0, 560.9, 11844.5), (5859.3, 529.7, 11185.0), (5546.0, 559.6, 11816.9), (5622.0, 552.0, 11657.0)],
)
def test_rates_reproduce_the_published_log(step_time_ms: float, tflops: float, tokens: float) -> None:
    flops = megatron_flops(QWEN2_5_VL_7B, num_sequences=64, seq_length=8192)
    assert tflops_per_gpu(flops, step_time_ms=step_time_ms, world_size=8) == pytest.approx(tflops, abs=0.1)
    rate = tokens_per_second_per_gpu(64 * 8192, step_time_ms=step_time_ms, world_size=8)
    assert rate == pytest.approx(tokens, abs=0.1)


def test_one_full_sequence_without_images_is_the_same_by_both_formulas() -> None:
    real = model_flops(model(), sample_lengths=[96, 96])
    assert real == megatron_flops(TINY_TEXT, num_sequences=2, seq_length=96)


def test_attention_counts_squares_of_sub_sequences() -> None:
    whole, halves = (model_flops(model(), sample_lengths=lengths) for lengths in ([96], [48, 48]))
    # half the square, two products, two operations each, three passes
    assert whole - halves == 3 * 2 * 2 * 4 * 16 * (96**2 - 2 * 48**2)


def test_dense_layers_of_a_sparse_decoder_use_their_own_width() -> None:
    sparse = replace(TINY_TEXT, moe=replace(moe(8), dense_layers=(0,)))
    dense = megatron_flops(TINY_TEXT, num_sequences=1, seq_length=10)
    assert dense - megatron_flops(sparse, num_sequences=1, seq_length=10) == 10 * 6 * 36 * 3 * (52 - 8 * 8)


@pytest.mark.parametrize(
    ("grid", "squares"),
    [
        # windows are 4 x 4 merged cells of 2 x 2 patches: 64 patches
        pytest.param((1, 8, 8), 64**2, id="one_window"),
        pytest.param((3, 16, 8), 3 * 2 * 64**2, id="three_frames_of_two"),
        # 5 x 6 cells: 4x4, 4x2, 1x4, 1x2 of them
        pytest.param((1, 10, 12), (64**2 + 32**2 + 16**2 + 8**2), id="ragged"),
    ],
)
def test_windows_are_cut_as_in_the_model(grid: tuple[int, int, int], squares: int) -> None:
    assert window_squares(WINDOWED, grid) == squares


def test_vision_tower_by_hand() -> None:
    found = vision_forward_flops(WINDOWED, (1, 8, 8))
    per_layer = 2 * 64 * (3 * 20 * 20 + 20 * 20 + 3 * 20 * 28) + 2 * 2 * 20 * 64**2
    merger = 2 * 16 * (80 * 80 + 80 * 36)
    assert found == {"patch_embed": 2 * 64 * 1176 * 20, "tower": 4 * per_layer, "mergers": merger}


def test_plain_mlp_and_deepstack_mergers() -> None:
    found = vision_forward_flops(DEEPSTACK, (2, 8, 8))
    per_layer = 2 * 128 * (4 * 20 * 20 + 2 * 20 * 28) + 2 * 2 * 20 * 2 * 64**2
    assert found["tower"] == 4 * per_layer
    assert found["mergers"] == 3 * 2 * 32 * (80 * 80 + 80 * 36)


def test_audio_tower_by_hand() -> None:
    # 130 frames: chunks of 100 and 30; three halvings leave 13 and 4 tokens; all 17 in one window
    convolutions = (
        2
        * 9
        * 6
        * sum(
            length * width * channels
            for lengths in ((50, 25, 13), (15, 8, 4))
            for length, width, channels in zip(lengths, (8, 4, 2), (1, 6, 6), strict=True)
        )
    )
    layer = 2 * 17 * (4 * 24 * 24 + 2 * 24 * 40) + 4 * 24 * 17**2
    ends = 2 * 17 * 24 * (6 * 2 + 24 + 28)
    assert audio_forward_flops(AUDIO, 130) == convolutions + 3 * layer + ends


def test_long_audio_attends_in_windows() -> None:
    # 1,600 frames: two windows of 8 chunks, 104 tokens each
    once, twice = audio_forward_flops(AUDIO, 800), audio_forward_flops(AUDIO, 1600)
    assert twice == 2 * once


@pytest.mark.parametrize(
    ("trainable", "passes"),
    [
        pytest.param(("language", "vision", "projector"), (3, 2, 3, 3), id="all"),
        pytest.param(("language",), (3, 1, 1, 1), id="vision_frozen"),
        pytest.param(("projector",), (2, 1, 1, 2), id="projector_only"),
        pytest.param(("vision",), (2, 2, 3, 2), id="vision_only"),
        pytest.param((), (1, 1, 1, 1), id="nothing"),
    ],
)
def test_frozen_parts_cost_only_their_passes(trainable: tuple[str, ...], passes: tuple[int, ...]) -> None:
    text_flops = model_flops(model(), sample_lengths=[40]) / 3
    vision = vision_forward_flops(WINDOWED, (1, 8, 8))
    parts = (text_flops, vision["patch_embed"], vision["tower"], vision["mergers"])
    found = model_flops(model(), sample_lengths=[40], grid_thw=[(1, 8, 8)], trainable=trainable)
    assert found == sum(count * flops for count, flops in zip(passes, parts, strict=True))


def test_unknown_part_and_missing_tower_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown part.*vit"):
        model_flops(model(), sample_lengths=[4], trainable=("vit",))
    with pytest.raises(ConfigError, match="no audio tower"):
        model_flops(model(), sample_lengths=[4], audio_frames=[100])
    assert model_flops(model(audio=AUDIO), sample_lengths=[4], audio_frames=[100]) > 0
