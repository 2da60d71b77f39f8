# SPDX-License-Identifier: Apache-2.0
"""Bad input through the real command: skipped, counted and named, or refused; never a stopped run, never a hang."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from models.datasets.scenes import encode_mp4
from models.entry.prepare import main


def picture(size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(stream, format=kind)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 40,000 x 40,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def run(*arguments: Any) -> int:
    """What `qwen-harness data` hands over to, in this process: starting another takes seconds."""
    return main([str(argument) for argument in arguments])


def turns(question: str = "<image>\nWhat?", answer: str = "red") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


WHOLE = picture()
IMAGES = {
    "good.jpg": WHOLE,
    "tiny.png": picture((1, 1), "PNG"),
    "cut.jpg": WHOLE[: len(WHOLE) // 2],
    "text.jpg": b"no picture",
    "empty.jpg": b"",
    "narrow.png": picture((20_000, 10), "PNG"),
    "bomb.png": bomb(),
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "cut": ({"image": "cut.jpg"}, "corrupt image"),
    "text": ({"image": "text.jpg"}, "corrupt image"),
    "empty": ({"image": "empty.jpg"}, "empty media"),
    "narrow": ({"image": "narrow.png"}, "image too narrow"),
    "bomb": ({"image": "bomb.png"}, "decompression bomb"),
    "missing": ({"image": "gone.jpg"}, "missing media"),
    "climbs": ({"image": "../../etc/passwd"}, "path leaves the dataset"),
    "absolute": ({"image": "/etc/passwd"}, "path leaves the dataset"),
    "number": ({"image": 7}, "bad json"),
    "half a pair": ({"image": "\ud83d.jpg"}, "text is not utf-8"),
    "two markers": ({"conversations": turns("<image><image>")}, "marker mismatch"),
    "no marker": ({"conversations": turns("What?")}, "marker mismatch"),
    "marker in answer": ({"conversations": turns(answer="<image>")}, "marker outside a user turn"),
    "no answer": ({"conversations": turns()[:1]}, "wrong role order"),
    "answer first": ({"conversations": turns()[::-1]}, "wrong role order"),
    "unknown role": ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role"),
    "empty answer": ({"conversations": turns(answer=" \n")}, "empty answer"),
    "no turns": ({"conversations": None}, "bad json"),
    "surrogate": ({"conversations": turns(answer="so \ud83d sad")}, "text is not utf-8"),
    "content list": ({"conversations": [{"from": "human", "value": ["x"]}]}, "bad json"),
}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    folder = tmp_path / "llava"
    folder.mkdir()
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data)
    return folder


def write(folder: Path, entries: list[dict[str, Any]]) -> Path:
    file = folder / "blip_laion_cc_sbu_558k.json"
    file.write_text(json.dumps(entries))
    return file


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return {"id": name, "image": "good.jpg", "conversations": turns()} | changes


def skipped_of(folder: Path) -> dict[str, dict[str, str]]:
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["entry"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("zipped", [False, True])
def test_llava_leaves_every_bad_sample_out_by_name_and_reason(
    llava: Path, tmp_path: Path, zipped: bool
) -> None:
    entries = [entry(name, **changes) for name, (changes, _) in BAD.items()]
    annotations = write(llava, [*entries, entry("whole"), entry("one pixel", image="tiny.png")])
    source: list[Any] = [llava]
    if zipped:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, data in IMAGES.items():
                archive.writestr(name, data)
        source = [llava, "--json", annotations, "--images", tmp_path / "images.zip"]
    out = tmp_path / "out"
    options = ["--workers", 1, "--verify", "decode", "--val-fraction", 0]
    assert run("llava-pretrain", *source, "-o", out, *options) == 0
    found = {name: row["reason"] for name, row in skipped_of(out).items()}
    assert found == {name.replace(" ", "_"): reason for name, (_, reason) in BAD.items()}
    assert json.loads((out / "about.json").read_text())["written"] == {"train": 2}


def test_header_check_rejects_what_a_header_shows(llava: Path, tmp_path: Path) -> None:
    shown = ("text", "empty", "narrow", "bomb")
    write(llava, [entry(name, **BAD[name][0]) for name in shown] + [entry("whole")])
    assert run("llava-pretrain", llava, "-o", tmp_path / "out", "--workers", 1) == 0
    found = skipped_of(tmp_path / "out")
    assert {name: row["reason"] for name, row in found.items()} == {name: BAD[name][1] for name in shown}
    assert "20000x10" in found["narrow"]["detail"]


def test_wholly_rejected_dataset_ends_with_the_top_reasons(llava: Path, tmp_path: Path, capsys: Any) -> None:
    rejected = [entry(f"n{i}", image="narrow.png") for i in range(5)] + [
        entry(f"t{i}", image="text.jpg") for i in range(3)
    ]
    write(llava, rejected)
    assert run("llava-pretrain", llava, "-o", tmp_path / "out", "--workers", 1) != 0
    said = capsys.readouterr().err
    assert "no usable sample" in said
    assert "image too narrow: 5; corrupt image: 3" in said
    assert not (tmp_path / "out").exists()


def test_encrypted_zip_rejects_its_members(llava: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("good.jpg", WHOLE)
        opened.writestr("locked.jpg", WHOLE)
    data = bytearray(archive.read_bytes())
    central = data.rindex(b"PK\x01\x02")  # the second member's entry of the directory
    data[central + 8] |= 1
    data[data.rindex(b"PK\x03\x04") + 6] |= 1
    archive.write_bytes(data)
    write(llava, [entry("open"), entry("locked", image="locked.jpg")])
    assert run("llava-pretrain", llava, "-o", tmp_path / "out", "--images", archive, "--workers", 1) == 0
    assert skipped_of(tmp_path / "out")["locked"]["reason"] == "unreadable media"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"id": "\xff\xfe"}]', "not UTF-8"),
        (b'[{"id": 1}', "not JSON"),
        (b'{"id": 1}', "not a list of objects"),
        (b"[]", "not a list of objects"),
        (b'["x"]', "not a list of objects"),
    ],
)
def test_annotations_that_cannot_be_read_are_refused(
    content: bytes, what: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    for command in (
        ["sharegpt", tmp_path / "a.json"],
        ["llava-instruct", tmp_path / "a.json", "--images", tmp_path],
    ):
        assert run(*command, "-o", tmp_path / "out") != 0
        assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def sound(count: int) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros((count, 1), np.float32), 16_000, format="WAV")
    return stream.getvalue()


def test_sharegpt_looks_at_videos_and_sounds_too(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), (40 * i, 0, 0)) for i in range(4)]
    media = {
        "good.mp4": encode_mp4(frames, fps=2), "one.mp4": encode_mp4(frames[:1], fps=2), "text.mp4": b"no video",
        "good.wav": sound(800), "empty.wav": sound(0), "text.wav": b"no sound", "one/0.jpg": WHOLE,
    }  # fmt: skip
    for name, data in media.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)

    def chat(kind: str, path: str) -> dict[str, Any]:
        return {"id": path, "conversations": turns(f"<{kind}>?"), f"{kind}s": [path]}

    videos = ("good.mp4", "one.mp4", "text.mp4", "one", "gone.mp4", "../up.mp4")
    sounds = ("good.wav", "empty.wav", "text.wav", "strange.xyz")
    chats = [chat("video", name) for name in videos] + [chat("audio", name) for name in sounds]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    out = tmp_path / "out"
    assert run("sharegpt", tmp_path / "chats.json", "-o", out, "--workers", 1, "--val-fraction", 0) == 0
    reasons = {name: row["reason"] for name, row in skipped_of(out).items()}
    assert reasons == {
        "one_mp4": "video too short", "text_mp4": "corrupt video", "one": "video too short",
        "gone_mp4": "missing media", "_/up_mp4": "path leaves the dataset",
        "empty_wav": "corrupt audio", "text_wav": "corrupt audio",
        "strange_xyz": "unknown media type",
    }  # fmt: skip
    assert json.loads((out / "about.json").read_text())["written"] == {"train": 2}


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))


def test_commands_that_make_a_dataset_answer_to_prepare_too(llava: Path, tmp_path: Path, capsys: Any) -> None:
    write(llava, [entry("whole")])
    assert run("prepare", "llava-pretrain", llava, "-o", tmp_path / "out", "--workers", 1) == 0
    assert (tmp_path / "out" / "about.json").exists()
    assert run("prepare", "nothing") == 2
    assert "No such command" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["index", "datajuicer", "migrate"])
@pytest.mark.parametrize("damage", ["truncated", "climbs", "empty", "no tar"])
def test_tars_that_cannot_be_trusted_are_refused(
    command: str, damage: str, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    tar(folder / "a.tar", {"../0.json" if damage == "climbs" else "0.json": b"x" * 3000})
    whole = (folder / "a.tar").read_bytes()
    content = {"truncated": whole[:2000], "empty": b"", "no tar": b"x" * 4000}.get(damage, whole)
    (folder / "a.tar").write_bytes(content)
    output = ["-o", tmp_path / "out"] if command == "migrate" else []
    assert run(command, folder, *output) != 0
    said = capsys.readouterr().err
    assert "a.tar" in said
    expected = {
        "truncated": "truncated tar",
        "climbs": "leaves its folder",
        "empty": "empty file",
        "no tar": "tar",
    }
    assert expected[damage] in said
    assert not (tmp_path / "out").exists()


def test_inspect_names_what_an_indexed_dataset_hides(tmp_path: Path, capsys: Any) -> None:
    chat = {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}],
        "media": ["image0.jpg"],
    }

    def payload(**changes: Any) -> bytes:
        return json.dumps(chat | changes).encode()

    tar(
        tmp_path / "a.tar",
        {
            "good.json": payload(), "good.image0.jpg": WHOLE,
            "latin.json": b'{"messages": "\xff\xfe"}',
            "cut.json": payload(), "cut.image0.jpg": IMAGES["cut.jpg"],
            "absent.json": payload(),
            "extra.json": payload(media=["image0.jpg", "image1.jpg"]), "extra.image0.jpg": WHOLE,
            "extra.image1.jpg": WHOLE,
            "bomb.json": payload(media=["image0.png"]), "bomb.image0.png": IMAGES["bomb.png"],
        },
    )  # fmt: skip
    assert run("index", tmp_path, "--split", "1,0,0") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["key"]: row["reason"] for row in result["broken"]} == {
        "latin": "text is not utf-8", "cut": "corrupt image", "absent": "missing media", "extra": "marker mismatch",
        "bomb": "decompression bomb",
    }  # fmt: skip
    assert Counter(row["file"] for row in result["broken"]) == {"a.tar": 5}
