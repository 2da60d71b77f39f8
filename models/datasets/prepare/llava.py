# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Pretrain, and LLaVA-Instruct-150K with COCO 2017."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.contract.errors import DataError
from models.datasets.prepare.source import MediaSource, Verify, suffix_of, verify_medium
from models.datasets.sample import Medium as SampleMedium
from models.datasets.sample import SampleRejected, check_roles, order_media, parse_turns
from models.datasets.shards import RawSample, safe_key

PRETRAIN_JSON = "blip_laion_cc_sbu_558k.json"
Layout = Literal["chat", "vqa"]
VQA_DATASET = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"},
    "field_map": {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"},
}
"""``dataset.yaml`` of the layout that the reference trains from."""


@dataclass(frozen=True, slots=True)
class ConvertLlava:
    """One entry {id, image?, conversations: [{from, value}]} to a sample.

    `layout` "vqa" writes what the reference's builder writes: ``<id>.jpg`` and ``<id>.json``, the bare list of turns.
    """

    media: MediaSource
    layout: Layout = "chat"
    verify: Verify = "header"
    prefix: str = ""
    """Before every image name, such as ``train2017/``."""

    def __call__(self, entry: dict[str, Any]) -> RawSample:
        """Convert. Raises SampleRejected."""
        turns = parse_turns(entry.get("conversations"))
        check_roles(turns)
        image = entry.get("image")
        media: dict[str, bytes] = {}
        if image:
            if not isinstance(image, str):
                raise SampleRejected("bad json", f"image is {type(image).__name__}")
            data = self.media.read(self.prefix + image)
            verify_medium("image", data, image, self.verify)
            media = {"jpg" if self.layout == "vqa" else f"image0.{suffix_of(image)}": data}
        order_media(
            turns, {"image": [SampleMedium("image", str(image), ()) for _ in media], "video": [], "audio": []}
        )
        if self.layout == "vqa":
            if not media or len(turns) != 2:
                raise SampleRejected("not one image and two turns", "the vqa layout holds nothing else")
            payload: Any = entry["conversations"]
        else:
            payload = {
                "messages": [{"role": t.role, "content": t.content} for t in turns],
                "media": list(media),
            }
        text = json.dumps(payload, ensure_ascii=False).encode()
        return RawSample(key_of_llava(entry), {"json": text, **media})


def key_of_llava(entry: dict[str, Any]) -> str:
    """Key of an entry: its id, which LLaVA gives out once."""
    return safe_key(str(entry.get("id") or Path(str(entry.get("image", "sample"))).stem))


def unique_entries(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give entries that share an id (LLaVA-Instruct asks several questions of one image) ids of their own."""
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        key = key_of_llava(entry)
        number = seen.get(key, 0)
        seen[key] = number + 1
        result.append({**entry, "id": f"{key}_{number}" if number else key})
    return result


def to_mllm(
    entries: Sequence[dict[str, Any]], media: MediaSource, *, prefix: str, image_prefix: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """LLaVA-Instruct entries as {images, messages} records, and what was left out.

    An entry whose image is not there is left out, one without image becomes text, a role other than human and gpt
    is an error: the rules of the script that published this format.

    Args:
        entries: LLaVA entries.
        media: COCO images.
        prefix: Before the image name inside `media`.
        image_prefix: Before the image name in the output.

    Raises:
        DataError: unknown role.
    """
    records, skipped = [], []
    for entry in entries:
        image, name = entry.get("image"), str(entry.get("id", ""))
        if image and not (isinstance(image, str) and media.has(prefix + image)):
            skipped.append({"entry": name, "reason": "missing media", "detail": str(image)})
            continue
        try:
            turns = parse_turns(entry.get("conversations"))
        except SampleRejected as error:
            if error.reason == "unknown role":
                raise DataError(
                    "unknown role", where=f"entry {name}", expected="human, gpt", got=error.detail
                ) from None
            skipped.append({"entry": name, "reason": error.reason, "detail": error.detail})
            continue
        records.append(
            {
                "images": [image_prefix + image] if image else [],
                "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
            }
        )
    return records, skipped
