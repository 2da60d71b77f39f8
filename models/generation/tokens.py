# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer: is it there, which tokens end an answer, tokens to text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.contract.errors import ConfigError, DataError
from models.datasets.chat import render_chat
from models.datasets.sample import Sample, SampleRejected

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Either set makes a tokenizer."""


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without tokenizer files, before a library words it its own way. Raises ConfigError."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise ConfigError(
            "the checkpoint has no tokenizer",
            where=str(folder),
            expected=" or ".join(" and ".join(names) for names in TOKENIZER_FILES),
            fix="copy the tokenizer files from the model's original folder",
        )


def end_tokens(folder: Path, processor: Any) -> tuple[int, ...]:
    """Tokens that end an answer: ``generation_config.json``'s, else the tokenizer's.

    Raises:
        ConfigError: the file is not JSON, or neither names one.
    """
    file = folder / "generation_config.json"
    found: Any = processor.tokenizer.eos_token_id
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", found)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ConfigError(
                "generation_config.json is not valid", where=str(file), got=str(error)
            ) from None
    ends = tuple(found) if isinstance(found, list) else (found,)
    if not all(isinstance(token, int) for token in ends):
        raise ConfigError(
            "the checkpoint names no end token", where=str(folder), expected="eos_token_id", got=repr(found)
        )
    return ends


def pad_token(processor: Any) -> int:
    """Token written into padding; what it is does not matter, as padding is masked."""
    tokenizer = processor.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def decode_text(processor: Any, token_ids: Sequence[int]) -> str:
    """Text of new tokens without special ones."""
    return processor.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()


def render_prompt(processor: Any, request: Sample) -> str:
    """Text of a request by the checkpoint's template, up to where the answer begins.

    Raises:
        DataError: the prompt holds text that would become a special token.
    """
    try:
        return render_chat(processor, request.turns, add_generation_prompt=True)
    except SampleRejected as error:
        raise DataError(
            f"the prompt cannot be used: {error.reason}",
            where=request.key,
            got=error.detail,
            fix="write the prompt as plain text; the chat template adds its own tokens",
        ) from None
