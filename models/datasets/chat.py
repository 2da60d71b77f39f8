# SPDX-License-Identifier: Apache-2.0
r"""Conversations to token ids, by the checkpoint's own chat template, and which tokens are learned.

Loss masks, for every answer of the conversation::

                    <|im_start|> assistant \n A red circle. <|im_end|> \n
    assistant                                 ^^^^^^^^^^^^^ ^^^^^^^^^^ ^^
    vqa_reference   ^^^^^^^^^^^^ ^^^^^^^^^ ^^ ^^^^^^^^^^^^^ ^^^^^^^^^^ ^^

`vqa_reference` is the published baseline's: its prompt was the template of the user turn without generation prompt,
so the header of the answer counts. The reference knows one turn; here every answer keeps its header.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.common.sequences import MediaItem
from models.datasets.sample import MARKER, SampleRejected, Turn

LossMask = Literal["assistant", "vqa_reference"]
ANSWER = re.compile(r"(?P<header><\|im_start\|>assistant\n)(?P<answer>.*?<\|im_end\|>\n?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TokenizedChat:
    """Token ids with one placeholder a media run [n] int64, and which are targets [n] bool."""

    ids: Tensor
    supervised: Tensor
    text: str


def to_template_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text pieces and media in order, white space around pieces removed.

    Stripping follows Qwen's own fine-tuning code and the reference. Answers stay as they are.
    """
    return [
        {"role": turn.role, "content": _parts(turn.content) if turn.role == "user" else turn.content}
        for turn in turns
    ]


def _parts(content: str) -> list[dict[str, str]]:
    if not MARKER.search(content):
        return [{"type": "text", "text": content.strip()}]
    pieces = MARKER.split(content)  # text, kind, text, kind, … text
    parts = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append({"type": piece})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def render_chat(processor: Any, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
    """Text of a conversation by the checkpoint's template, one placeholder a medium.

    The processor's template counts; some tokenizers carry another one.

    Raises:
        SampleRejected: a turn contains text that would become a special token.
    """
    _refuse_special_text(processor.tokenizer, turns)
    return processor.tokenizer.apply_chat_template(
        to_template_messages(turns),
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )


def _refuse_special_text(tokenizer: Any, turns: Sequence[Turn]) -> None:
    for turn in turns:
        if "<" not in turn.content:
            continue
        for token in tokenizer.get_added_vocab():
            if token in turn.content:
                raise SampleRejected("special token in text", token)


def insert_media(processor: Any, text: str, items: Sequence[MediaItem]) -> str:
    """Put each medium's text in place of its placeholder.

    Raises:
        SampleRejected: the template did not write one placeholder of the right kind for each medium.
    """
    token_of = placeholder_tokens(processor)
    rest = list(items)

    def replace(found: re.Match[str]) -> str:
        if not rest or token_of[rest[0].kind] != found.group():
            raise SampleRejected(
                "marker mismatch", f"the template wrote {found.group()} where no such medium is"
            )
        return rest.pop(0).text

    pattern = "|".join(re.escape(token) for token in token_of.values())
    inserted = re.sub(pattern, replace, text)
    if rest:
        raise SampleRejected("marker mismatch", f"the template wrote no placeholder for a {rest[0].kind}")
    return inserted


def placeholder_tokens(processor: Any) -> dict[str, str]:
    """Placeholder token of each kind of medium that this checkpoint knows."""
    tokens = {"image": processor.image_token, "video": processor.video_token}
    if "audio_token" in vars(processor):
        tokens["audio"] = processor.audio_token
    return tokens


def tokenize_chat(
    processor: Any, turns: Sequence[Turn], items: Sequence[MediaItem], *, loss_mask: LossMask
) -> TokenizedChat:
    """Render, insert media, tokenize, and mark what is learned.

    Raises:
        SampleRejected: special tokens in the text, or nothing to learn.
    """
    text = insert_media(processor, render_chat(processor, turns), items)
    encoding = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = torch.tensor(encoding["input_ids"])
    begin, end = torch.tensor(encoding["offset_mapping"]).unbind(1)  # characters
    supervised = torch.zeros(ids.numel(), dtype=torch.bool)
    part = "answer" if loss_mask == "assistant" else "header"
    for found in ANSWER.finditer(text):
        supervised |= (begin >= found.start(part)) & (end <= found.end("answer"))
    if not supervised.any():
        raise SampleRejected("nothing to learn", "the template wrote no answer")
    return TokenizedChat(ids, supervised, text)
