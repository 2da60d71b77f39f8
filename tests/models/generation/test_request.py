# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from models.contract.errors import ConfigError, DataError
from models.datasets.sample import Medium, Sample, Turn
from models.generation.request import (
    GenerationOptions,
    check_context,
    read_requests,
    request_from_files,
    requests_of_sample,
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"not looked at here")
    return file


def test_request_puts_media_in_front_of_a_prompt_without_markers(picture: Path) -> None:
    request = request_from_files("What is it?", images=[picture, picture], audios=[picture])
    assert request.turns[-1].content == "<image>\n<image>\n<audio>\nWhat is it?"
    assert [medium.kind for medium in request.media] == ["image", "image", "audio"]


def test_request_keeps_the_places_of_markers(picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.jpg"
    other.write_bytes(b"other")
    request = request_from_files("<audio> then <image>", images=[picture], audios=[other], system="Be brief.")
    assert [medium.data for medium in request.media] == [(b"other",), (picture.read_bytes(),)]
    assert request.turns[0] == Turn("system", "Be brief.")


def test_request_refuses_more_markers_than_files(picture: Path) -> None:
    with pytest.raises(DataError, match="more <image> markers than media"):
        request_from_files("<image> and <image>", images=[picture])


def test_request_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image cannot be read[\s\S]*nowhere.jpg"):
        request_from_files("x", images=[tmp_path / "nowhere.jpg"])


def test_request_takes_a_folder_of_frames_in_name_order(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        (tmp_path / f"frame{index}.png").write_bytes(bytes([index]))
    (medium,) = request_from_files("x", videos=[tmp_path]).media
    assert medium.is_frames
    assert medium.data == (b"\0", b"\1", b"\2")


def test_read_requests_resolves_paths_beside_the_file(picture: Path) -> None:
    file = picture.with_name("ask.jsonl")
    file.write_text(
        json.dumps({"prompt": "What?", "images": ["a.jpg"], "key": "k"}) + '\n\n{"prompt": "Hi"}\n'
    )
    first, second = read_requests(file)
    assert (first.key, first.media[0].name, second.key) == ("k", str(picture), "000003")


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": 1}', '{"prompt": "x", "pictures": []}'])
def test_read_requests_names_a_bad_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"ask\.jsonl:2"):
        list(read_requests(file))


def test_requests_of_sample_show_only_what_came_before() -> None:
    turns = (
        Turn("user", "<image>\nColour?"), Turn("assistant", "red"),
        Turn("user", "And <image> here?"), Turn("assistant", "blue"),
    )  # fmt: skip
    sample = Sample("k", "", turns, (Medium("image", "0", (b"",)), Medium("image", "1", (b"",))))
    (first, question, truth), (second, _, _) = requests_of_sample(sample)
    assert (first.key, question, truth, len(first.media)) == ("k#1", "Colour?", "red", 1)
    assert (second.key, second.turns, len(second.media)) == ("k#3", turns[:3], 2)


def test_context_check_leaves_room_for_one_token() -> None:
    request = Sample("k", "", (Turn("user", "x"),))
    check_context(request, 9, 10)
    with pytest.raises(DataError, match="longer than the context"):
        check_context(request, 10, 10)


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_k", -1)]
)
def test_options_refuse_what_is_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        GenerationOptions(**{name: value})
