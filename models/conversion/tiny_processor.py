# SPDX-License-Identifier: Apache-2.0
"""Tokenizer, chat template and processor files of a tiny checkpoint: the real kinds of files, made on the spot."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from models.contract.architecture import Family
from models.contract.tiny_config import NUM_BPE_TOKENS, PLAIN_ADDED_TOKENS, added_tokens, token_ids

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501 - one expression
"""How Qwen splits text before byte-pair encoding; a format constant, as transformers' Qwen2Tokenizer has it."""

_COLOURS = [
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "white",
    "black",
    "grey",
    "brown",
    "pink",
    "cyan",
]
_SHAPES = ["circle", "square", "triangle", "bar", "star", "cross", "ring", "diamond"]
_PLACES = [
    "top",
    "bottom",
    "left",
    "right",
    "middle",
    "top",
    "left",
    "bottom",
    "right",
    "center",
    "above",
    "below",
    "beside",
]
_PHRASES = (
    "You are a helpful assistant.", "You look closely and answer in few words.", "Describe the image.",
    "What is shown?", "Write a short caption.", "What colour is the shape?", "Which shape is it?", "Where is it?",
    "How many shapes are there?", "zero one two three four five six seven eight nine ten", "yes no",
    "First image: Second image: Which colours are they?", "Do they show the same shape?", "Where does it move?",
    "Say backwards: Repeat:", "The tone rises. The tone falls. The tone stays. What does the tone do?",
    "system user assistant Picture 1: Video 1: <0.2 seconds> <1.5 seconds>", "A photo of a cat on a table.",
    "There is a person standing in front of the camera, looking at the coffee cup.",
    "The rocket stands on the launch pad under a clear sky.", "What can be seen in this picture? Please describe it.",
)  # fmt: skip

_MEDIA_MACRO = """\
{%- set seen = namespace(image=0, video=0) -%}
{%- macro part(piece) -%}
  {%- if piece is string -%}{{ piece }}
  {%- elif piece.type == 'image' or 'image' in piece or 'image_url' in piece -%}
    {%- set seen.image = seen.image + 1 -%}
    {%- if add_vision_id -%}Picture {{ seen.image }}: {% endif -%}
    <|vision_start|><|image_pad|><|vision_end|>
  {%- elif piece.type == 'video' or 'video' in piece -%}
    {%- set seen.video = seen.video + 1 -%}
    {%- if add_vision_id -%}Video {{ seen.video }}: {% endif -%}
    <|vision_start|><|video_pad|><|vision_end|>
  {%- elif piece.type == 'audio' or 'audio' in piece or 'audio_url' in piece -%}
    <|audio_start|><|audio_pad|><|audio_end|>
  {%- elif 'text' in piece -%}{{ piece.text }}
  {%- endif -%}
{%- endmacro -%}
"""
_DEFAULT_SYSTEM = """\
{%- if messages and messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
_TURNS = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}{{- message.content -}}
  {%- else -%}{%- for piece in message.content -%}{{- part(piece) -}}{%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def chat_template(family: Family) -> str:
    """A ChatML template with media; it renders conversations as the family's published template does."""
    return _MEDIA_MACRO + (_DEFAULT_SYSTEM if family == "qwen2_5_vl" else "") + _TURNS


def train_tokenizer(family: Family) -> Tokenizer:
    """A byte-level BPE of exactly `NUM_BPE_TOKENS` entries, learned from scene captions, plus the added tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BPE_TOKENS,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    assert tokenizer.get_vocab_size() == NUM_BPE_TOKENS, "the corpus has too few merges"
    for token in added_tokens(family):
        plain = token in PLAIN_ADDED_TOKENS
        tokenizer.add_tokens([AddedToken(token, special=not plain, normalized=False)])
    return tokenizer


def _corpus() -> list[str]:
    lines = [
        f"A {colour} {shape} at the {place}." for colour in _COLOURS for shape in _SHAPES for place in _PLACES
    ]
    lines += [
        f"The {colour} {shape} moves {place}."
        for colour in _COLOURS
        for shape in _SHAPES
        for place in _PLACES
    ]
    return lines + [phrase for phrase in _PHRASES for _ in range(8)]


def write_processor_files(folder: Path, family: Family) -> None:
    """Write every file that AutoTokenizer, AutoProcessor and generation read."""
    tokenizer = train_tokenizer(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    ids = token_ids(family)
    _write(folder / "tokenizer_config.json", _tokenizer_config(family, ids))
    _write(folder / "chat_template.json", {"chat_template": chat_template(family)})
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    generation = {"bos_token_id": ends[1], "eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False}
    _write(folder / "generation_config.json", generation)
    for name, data in _preprocessors(family).items():
        _write(folder / name, data)


def _tokenizer_config(family: Family, ids: dict[str, int]) -> dict[str, Any]:
    decoder = {
        str(number): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token not in PLAIN_ADDED_TOKENS,
        }
        for token, number in ids.items()
    }  # fmt: skip
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
    }
    names |= {"vision_eos_token": "<|vision_end|>"}
    if family == "qwen3_omni":
        names |= {
            "audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"
        }  # fmt: skip
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [token for token in ids if token not in PLAIN_ADDED_TOKENS][1:],
        "bos_token": None,
        "chat_template": chat_template(family),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **(names if family == "qwen3_omni" else {}),
    }


def _preprocessors(family: Family) -> dict[str, dict[str, Any]]:
    if family == "qwen2_5_vl":
        image = {
            "min_pixels": 28 * 28, "max_pixels": 112 * 112, "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }  # fmt: skip
        return {"preprocessor_config.json": image}
    common = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    video_size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64}
    if family == "qwen3_vl":
        return {
            "preprocessor_config.json": {
                "size": size, **common, "processor_class": "Qwen3VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessorFast",
            },
            "video_preprocessor_config.json": {
                "size": video_size, **common, "processor_class": "Qwen3VLProcessor",
                "video_processor_type": "Qwen3VLVideoProcessor",
            },
        }  # fmt: skip
    audio = {
        "dither": 0.0, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "hop_length": 160,
        "chunk_length": 300, "n_fft": 400, "n_samples": 4800000, "nb_max_frames": 30000, "padding_side": "right",
        "padding_value": 0.0, "return_attention_mask": True, "sampling_rate": 16000,
    }  # fmt: skip
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {
        "preprocessor_config.json": {
            **audio, **common, **pixels, "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3OmniMoeProcessor",
        },
        "video_preprocessor_config.json": {
            **common, "size": video_size, "min_frames": 4, "max_frames": 32, "fps": 2,
            "video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen3OmniMoeProcessor",
        },
    }  # fmt: skip


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
