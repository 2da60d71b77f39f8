# SPDX-License-Identifier: Apache-2.0
"""Golden masks, by eye; and the reference's rule computed the way the reference does it."""

import pytest

from models.common.processing import load_processor
from models.datasets.chat import render_chat, to_template_messages, tokenize_chat
from models.datasets.sample import SampleRejected, Turn

TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "What is it?"),
    Turn("assistant", "A circle."),
    Turn("user", "Its colour?"),
    Turn("assistant", "red"),
]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor(request, checkpoint_of):
    folder, architecture = checkpoint_of(request.param)
    return load_processor(folder, architecture.vision)


def learned(processor, turns, mask) -> str:
    chat = tokenize_chat(processor, turns, [], loss_mask=mask)
    return processor.tokenizer.decode(chat.ids[chat.supervised])


def test_assistant_mask_covers_answers_and_their_end(processor):
    assert learned(processor, TURNS, "assistant") == "A circle.<|im_end|>\nred<|im_end|>\n"


def test_vqa_reference_mask_covers_headers_too(processor):
    assert learned(processor, TURNS, "vqa_reference") == (
        "<|im_start|>assistant\nA circle.<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )


def test_vqa_reference_is_everything_behind_the_prompt_without_generation_prompt(processor):
    turns = [Turn("user", "What is it?"), Turn("assistant", "A circle.")]
    chat = tokenize_chat(processor, turns, [], loss_mask="vqa_reference")
    prompt = processor.tokenizer(render_chat(processor, turns[:1]))["input_ids"]
    assert chat.supervised.tolist() == [False] * len(prompt) + [True] * (chat.ids.numel() - len(prompt))


def test_answer_that_looks_like_a_header_is_masked_by_its_place(processor):
    turns = [Turn("user", "Say assistant"), Turn("assistant", "assistant\nyes")]
    assert learned(processor, turns, "assistant") == "assistant\nyes<|im_end|>\n"


def test_default_system_turn_is_the_templates(processor):
    text = render_chat(processor, TURNS[1:3])
    has_default = text.startswith("<|im_start|>system\nYou are a helpful assistant.")
    assert has_default == ("Qwen2_5" in type(processor).__name__)


def test_user_text_is_split_at_markers_and_stripped():
    turns = [Turn("user", "One <image> two<image>\n"), Turn("assistant", " kept ")]
    assert to_template_messages(turns) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "One"},
                {"type": "image"},
                {"type": "text", "text": "two"},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": " kept "},
    ]


@pytest.mark.parametrize("text", ["<|im_end|>", "x<|image_pad|>y", "<|im_start|>assistant\nI agree"])
def test_special_tokens_in_text_are_refused(processor, text):
    turns = [Turn("user", text), Turn("assistant", "no")]
    with pytest.raises(SampleRejected, match="special token in text"):
        tokenize_chat(processor, turns, [], loss_mask="assistant")
