# SPDX-License-Identifier: Apache-2.0
"""Prepared folders are opened with stock energon and webdataset, not only with our own reader."""

import io
import json
import pickle
import tarfile
import zipfile

import pytest
import webdataset
from megatron.energon import CrudeWebdataset, WorkerConfig, get_loader, get_val_dataset
from megatron.energon.epathlib import EPath
from PIL import Image

from models.contract.errors import DataError
from models.datasets.energon import open_dataset, worker_config
from models.datasets.prepare.job import split_by_key, write_dataset
from models.datasets.prepare.legacy import load_bytes_lists
from models.datasets.prepare.source import check_overlap, open_source
from models.datasets.prepare.synthetic import ConvertScene
from models.datasets.sample import SampleRejected, parse_sample
from models.datasets.shards import RawSample, index_dataset
from models.entry.prepare import main


def jpeg(colour="red", size=(64, 48)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, format="JPEG")
    return stream.getvalue()


def samples_of(folder, split="train"):
    reader = open_dataset(str(folder), split, worker_config(0, 1, 0, 0), training=False).reader()
    return [parse_sample(reader[index]) for index in range(len(reader))]


@pytest.fixture
def llava(tmp_path):
    """A folder in LLaVA's format with 20 good entries and three bad ones."""
    folder = tmp_path / "llava"
    (folder / "images").mkdir(parents=True)
    entries = []
    for i in range(23):
        name = f"images/{i:03d}.jpg"
        (folder / name).write_bytes(b"broken" if i == 20 else jpeg())
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "" if i == 22 else "red"},
        ]
        entries.append({"id": f"{i:03d}", "image": name, "conversations": turns})
    entries[21]["image"] = "../outside.jpg"
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(entries))
    return folder


# webdataset leaves its shard to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_scenes_open_with_stock_energon_and_webdataset(scenes_folder):
    dataset = CrudeWebdataset(
        EPath(str(scenes_folder)), split_part="train", training=False, decoder=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )  # fmt: skip
    assert len(dataset) == 96
    tar = str(scenes_folder / "train-000000.tar")
    first, *_ = list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False))
    assert first["__key__"] == "train-000000"
    assert "messages" in json.loads(first["json"])


def test_splits_never_share_a_scene(scenes_folder):
    train, val = samples_of(scenes_folder), samples_of(scenes_folder, "val")
    assert (len(train), len(val)) == (96, 24)
    content = [
        {(sample.turns, sample.media[0].data if sample.media else ()) for sample in part}
        for part in (train, val)
    ]
    assert not content[0] & content[1]


def test_llava_pretrain_keeps_bytes_and_names_what_it_left_out(llava, tmp_path):
    out = tmp_path / "out"
    assert (
        main(["llava-pretrain", str(llava), "-o", str(out), "--val-fraction", "0.1", "--workers", "1"]) == 0
    )
    train, val = samples_of(out), samples_of(out, "val")
    assert len(train) + len(val) == 20
    assert train[0].media[0].data == (jpeg(),)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in skipped} == {
        "corrupt image",
        "path leaves the dataset",
        "empty answer",
    }


def test_vqa_layout_is_the_references_and_opens_as_stock_vqa(llava, tmp_path):
    out = tmp_path / "out"
    main(
        [
            "llava-pretrain",
            str(llava),
            "-o",
            str(out),
            "--layout",
            "vqa",
            "--val-fraction",
            "0.2",
            "--workers",
            "1",
        ]
    )
    dataset = get_val_dataset(
        str(out),
        split_part="val",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
    )
    sample = next(iter(get_loader(dataset)))
    assert sample.context == ["<image>\nWhat?"]
    assert sample.answers == [["red"]] or sample.answers == ["red"]
    assert samples_of(out)[0].turns[1].content == "red"


def test_existing_output_is_refused_with_one_clear_error(llava, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["llava-pretrain", str(llava), "-o", str(tmp_path / "out")]) == 1
    assert "output exists" in capsys.readouterr().err


def test_wrong_usage_has_its_own_code(capsys):
    assert main(["llava-pretrain"]) == 2
    assert "Missing" in capsys.readouterr().err


def test_zip_of_another_dataset_is_refused(llava, tmp_path, capsys):
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("coco/1.jpg", jpeg())
    assert main(["llava-pretrain", str(llava), "-o", str(tmp_path / "out"), "--images", str(other)]) == 1
    assert "do not belong to these annotations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_are_read_from_a_zip(llava, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((llava / "images").iterdir()):
            archive.write(path, f"images/{path.name}")
    code = main(
        ["llava-pretrain", str(llava), "-o", str(tmp_path / "out"), "--images", str(tmp_path / "images.zip"),
         "--workers", "1"]
    )  # fmt: skip
    assert code == 0


def count_calls(entry):
    """Convert, and leave a trace of each call beside the entry's marker file."""
    marker, index, fail = entry
    with marker.open("a") as stream:
        stream.write(f"{index}\n")
    if fail and not marker.with_suffix(".ok").exists():
        raise OSError("disk full")
    return ConvertScene("scenes", 0)(("train", index))


def test_stopped_job_goes_on_where_it_was(tmp_path):
    marker = tmp_path / "calls"
    entries = [(marker, index, index == 25) for index in range(30)]
    job = {"about": {"source": "test"}, "shard_size": 10}
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "out", {"train": entries}, count_calls, **job)
    assert not (tmp_path / "out").exists()
    marker.write_text("")
    marker.with_suffix(".ok").touch()
    summary = write_dataset(tmp_path / "out", {"train": entries}, count_calls, **job)
    assert summary.reused_shards == 2
    assert marker.read_text().split() == [str(i) for i in range(20, 30)]
    assert len(samples_of(tmp_path / "out")) == 30


def test_stopped_job_with_another_plan_is_refused(tmp_path):
    marker = tmp_path / "calls"
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "out", {"train": [(marker, 0, True)]}, count_calls, about={"source": "a"})
    with pytest.raises(DataError, match="other settings"):
        write_dataset(tmp_path / "out", {"train": [(marker, 0, True)]}, count_calls, about={"source": "b"})


def test_split_by_key_is_stable_and_exact():
    entries = [f"k{i}" for i in range(50)]
    splits = split_by_key(entries, str, 0.1)
    assert len(splits["val"]) == 5
    assert set(split_by_key(entries[::-1], str, 0.1)["val"]) == set(splits["val"])
    assert "val" not in split_by_key(entries, str, 0.0)


def test_sharegpt_with_everything(tmp_path):
    frames = tmp_path / "clips" / "a"
    frames.mkdir(parents=True)
    for i in range(4):
        (frames / f"{i}.jpg").write_bytes(jpeg())
    (tmp_path / "clips" / "a.json").write_text('{"fps": "4.0"}')
    (tmp_path / "x.jpg").write_bytes(jpeg("blue"))
    chat = {
        "id": "one",
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "<video> and <image>?"},
            {"from": "gpt", "value": "red, blue"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "yes"},
        ],
        "images": "x.jpg",
        "videos": ["clips/a"],
    }
    (tmp_path / "chats.json").write_text(json.dumps([chat, {**chat, "id": "two", "images": []}]))
    assert (
        main(["sharegpt", str(tmp_path / "chats.json"), "-o", str(tmp_path / "out"), "--val-fraction", "0"])
        == 0
    )
    (sample,) = samples_of(tmp_path / "out")
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [(m.kind, m.fps, len(m.data)) for m in sample.media] == [("video", 4.0, 4), ("image", None, 1)]


def test_llava_instruct_makes_mllm_records(tmp_path):
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "coco" / "train2017" / "1.jpg").write_bytes(jpeg())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    entries = [
        {"id": "1", "image": "1.jpg", "conversations": turns},
        {"id": "1", "image": "1.jpg", "conversations": turns},
        {"id": "2", "image": "gone.jpg", "conversations": turns},
        {"id": "3", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    (tmp_path / "i.json").write_text(json.dumps(entries))
    arguments = ["llava-instruct", str(tmp_path / "i.json"), "--images", str(tmp_path / "coco")]
    assert (
        main(
            [
                *arguments,
                "--mllm-json",
                str(tmp_path / "m.json"),
                "-o",
                str(tmp_path / "out"),
                "--val-fraction",
                "0",
            ]
        )
        == 0
    )
    records = json.loads((tmp_path / "m.json").read_text())
    assert [record["images"] for record in records] == [["./train2017/1.jpg"], ["./train2017/1.jpg"], []]
    assert records[0]["messages"][0] == {"role": "user", "content": "<image>\nWhat?"}
    assert sorted(sample.key for sample in samples_of(tmp_path / "out")) == ["1", "1_1", "3"]


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("value", [Bomb(), [Bomb()], {"a": b"x"}, "text", [1], [[b"a", "b"]], (b"a",)])
def test_pickles_of_anything_but_bytes_are_refused_unexecuted(value, capsys):
    with pytest.raises(SampleRejected):
        load_bytes_lists(pickle.dumps(value))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", range(3, 6))
def test_pickled_lists_of_bytes_are_read(protocol):
    value = [b"a" * 300, b"", [b"x", b"y"]]
    assert load_bytes_lists(pickle.dumps(value, protocol=protocol)) == value


def test_old_chat_tars_are_migrated(tmp_path):
    turns = [{"role": "user", "content": "<image><video>What?"}, {"role": "assistant", "content": "red"}]
    payload = {"conversations": turns, "second_per_grid_ts": [0.25]}
    (tmp_path / "old").mkdir()
    with tarfile.open(tmp_path / "old" / "a.tar", "w") as tar:
        for key, images in (("0", pickle.dumps([jpeg()])), ("1", pickle.dumps(Bomb()))):
            members = {
                "jpgs": images,
                "mp4s": pickle.dumps([[jpeg(), jpeg()]]),
                "json": json.dumps(payload).encode(),
            }
            for suffix, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    assert main(["migrate", str(tmp_path / "old"), "-o", str(tmp_path / "new"), "--val-fraction", "0"]) == 0
    (sample,) = samples_of(tmp_path / "new")
    assert [(m.kind, m.fps) for m in sample.media] == [("image", None), ("video", 4.0)]
    assert "pickle" in (tmp_path / "new" / "skipped.jsonl").read_text()


def tar_with(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 2000
            tar.addfile(entry, io.BytesIO(b"x" * 2000))


def test_index_refuses_broken_tars_and_names_them(tmp_path):
    tar_with(tmp_path / "a.tar", ["0.json", "1.json"])
    tar_with(tmp_path / "b.tar", ["2.json", "3.json"])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match=r"(?s)1 broken tar file.*b\.tar \(truncated tar\)"):
        index_dataset(tmp_path, ratios={"train": 1})
    assert index_dataset(tmp_path, ratios={"train": 1}, skip_broken=True) == {"a.tar": 2}


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json"])
def test_index_refuses_members_that_leave_the_folder(tmp_path, name):
    tar_with(tmp_path / "a.tar", [name])
    with pytest.raises(DataError, match="leaves its folder"):
        index_dataset(tmp_path, ratios={"train": 1})


def test_index_refuses_equal_keys(tmp_path):
    tar_with(tmp_path / "a.tar", ["0.json"])
    tar_with(tmp_path / "b.tar", ["0.json"])
    with pytest.raises(DataError, match="the same key"):
        index_dataset(tmp_path, ratios={"train": 1})


def test_index_splits_by_ratio_and_writes_the_sample_class(tmp_path):
    for number in range(10):
        tar_with(tmp_path / f"{number}.tar", [f"{number}.json"])
    code = main(
        ["index", str(tmp_path), "--split", "9,1,0", "--sample-class", "VQASample", "--field", "image=jpg",
         "--field", "context=json[0][value]"]
    )  # fmt: skip
    assert code == 0
    text = (tmp_path / ".nv-meta" / "dataset.yaml").read_text()
    assert "VQASample" in text
    assert "json[0][value]" in text


def test_links_out_of_the_media_folder_are_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(SampleRejected, match="link out of it"):
        open_source(tmp_path / "media").read("a.jpg")


def test_overlap_is_found_behind_missing_files(tmp_path):
    (tmp_path / "b.jpg").write_bytes(jpeg())
    check_overlap(open_source(tmp_path), ["a.jpg", "b.jpg"], where="x")
    with pytest.raises(DataError, match="do not belong"):
        check_overlap(open_source(tmp_path), ["a.jpg"], where="x")


def test_photos_go_the_way_of_llava(tmp_path):
    assert main(["photos", "-o", str(tmp_path / "raw")]) == 0
    code = main(["llava-pretrain", str(tmp_path / "raw"), "-o", str(tmp_path / "out"), "--val-fraction", "0.1",
                 "--workers", "1", "--verify", "decode"])  # fmt: skip
    assert code == 0
    assert len(samples_of(tmp_path / "out")) == 43
    assert "public domain" in (tmp_path / "raw" / "LICENCES.txt").read_text()


def test_inspect_counts_and_draws_sheets(scenes_folder, checkpoint_of, tmp_path, capsys):
    folder, _ = checkpoint_of("qwen3_vl")
    arguments = ["inspect", str(scenes_folder), "--checkpoint", str(folder), "--limit", "24", "--json"]
    assert main([*arguments, "--sheet", str(tmp_path / "sheet.html"), "--sheet-samples", "6"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["num_seen"] == 24
    assert data["reasons"] == {}
    assert data["lengths"]["supervised tokens"]["min"] > 0
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<article>") == 6
    assert "<mark>" in page
    assert main([*arguments, "--sheet", str(tmp_path / "sheet.png"), "--sheet-samples", "6"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_inspect_names_broken_samples(tmp_path, capsys):
    entries = []
    for name, data in (("good", jpeg()), ("bad", jpeg()[:200])):
        text = {
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
        }
        entries.append(
            (name, {"json": json.dumps({**text, "media": ["image0.jpg"]}).encode(), "image0.jpg": data})
        )
    write_dataset(tmp_path / "d", {"train": entries}, as_raw, about={"source": "test"})
    assert main(["inspect", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "2 samples, 1 usable" in out
    assert "bad: corrupt image" in out


def as_raw(entry):
    return RawSample(*entry)
