# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from threading import Thread

import pytest

from models.contract.whole_file import write_whole


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_file_is_replaced(tmp_path: Path, *, is_shared: bool) -> None:
    file = tmp_path / "a.json"
    for text in ("before, and longer\n", "après\n"):
        write_whole(file, text, is_shared=is_shared)
        assert file.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("moment", ["open", "replace"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_cannot_be_written_leaves_the_file_as_it_was(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_shared: bool
) -> None:
    file = tmp_path / "a.json"
    file.write_text("2\n")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, moment, full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(file, "4\n", is_shared=is_shared)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "2\n")]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    texts = [f"{number}" * 20_000 for number in range(8)]
    writers = [
        Thread(target=write_whole, args=(tmp_path / "run.json", text), kwargs={"is_shared": True})
        for text in texts
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    [file] = tmp_path.iterdir()
    assert file.read_text() in texts
