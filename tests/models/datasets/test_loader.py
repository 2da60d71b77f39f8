# SPDX-License-Identifier: Apache-2.0
import io
import itertools
import json
import multiprocessing
import tarfile
import threading
import time
import types

import pytest
import torch

from models.contract.errors import ConfigError, DataError
from models.contract.recipe import parse_recipe
from models.contract.site import Site
from models.datasets.loader import build_loader
from models.datasets.prepare.job import write_dataset
from models.datasets.scenes import scene_at
from models.datasets.shards import RawSample


@pytest.fixture
def make(checkpoint_of, scenes_folder):
    """Build a loader over the scenes, or another folder, with changed settings."""
    folder, architecture = checkpoint_of("qwen3_vl")

    def build(split="train", rank=0, size=1, dataset=scenes_folder, mbs=2, gbs=8, seed=1234, **data):
        recipe = parse_recipe(
            {
                "name": "test", "num_processes": size,
                "model": {"family": "qwen3_vl", "checkpoint": str(folder)},
                "data": {"dataset": str(dataset), "seq_length": 256, "padding": "longest", **data},
                "train": {"train_iters": 1, "micro_batch_size": mbs, "global_batch_size": gbs, "seed": seed},
                "optimizer": {"lr": 1e-3},
            },
            where="test",
        )  # fmt: skip
        return build_loader(
            recipe, Site(), architecture, split=split, data_parallel_rank=rank, data_parallel_size=size
        )

    return build


def keys(loader, count):
    return [batch.sample_keys for batch in itertools.islice(loader, count)]


def write(folder, samples):
    write_dataset(folder, {"train": list(samples)}, raw, about={"source": "test"}, shard_size=20)
    return folder


def raw(entry):
    return RawSample(*entry)


def scenes(count):
    return [(scene.key, scene.members()) for scene in (scene_at(i, split="train") for i in range(count))]


def test_order_follows_from_the_seed(make):
    assert keys(make(), 12) == keys(make(), 12)
    assert keys(make(), 12) != keys(make(seed=2), 12)


def test_one_pass_sees_every_sample_once(make):
    seen = [key for batch in keys(make(shuffle_buffer_size=1), 48) for key in batch]
    assert len(seen) == 96
    assert len(set(seen)) == 96


def test_global_batch_is_the_same_for_every_number_of_ranks(make):
    one = [key for batch in keys(make(), 12) for key in batch]
    ranks = [keys(make(rank=rank, size=2), 6) for rank in range(2)]
    for step in range(3):
        split = [key for rank in ranks for batch in rank[step * 2 : step * 2 + 2] for key in batch]
        assert sorted(split) == sorted(one[step * 8 : step * 8 + 8])


def test_global_batch_is_the_same_for_every_micro_batch_size(make):
    assert [k for b in keys(make(mbs=1), 16) for k in b] == [k for b in keys(make(mbs=4), 4) for k in b]


def test_ranks_never_share_a_sample_in_one_pass(make):
    seen = [
        {key for batch in keys(make(rank=rank, size=4, shuffle_buffer_size=1), 12) for key in batch}
        for rank in range(4)
    ]
    assert sum(len(part) for part in seen) == len(set.union(*seen)) == 96


@pytest.mark.parametrize("at", [0, 1, 5, 60])
def test_state_restores_exactly(make, at):
    loader = make()
    keys(loader, at)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [batch.input_ids for batch in itertools.islice(loader, 8)]
    other = make()
    other.load_state_dict(state)
    assert all(torch.equal(a, b.input_ids) for a, b in zip(expected, other, strict=False))


def test_state_restores_exactly_with_packing(make):
    loader = make(mbs=1, packing=True)
    keys(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = keys(loader, 5)
    other = make(mbs=1, packing=True)
    other.load_state_dict(state)
    assert keys(other, 5) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_give_the_order_of_streams_and_restore(make):
    loader = make(num_workers=2, gbs=2, mbs=1)
    first = keys(loader, 9)
    assert first == keys(make(num_workers=0, gbs=2, mbs=1), 9)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = keys(loader, 9)
    loader.close()
    other = make(num_workers=2, gbs=2, mbs=1)
    other.load_state_dict(state)
    assert keys(other, 9) == expected
    other.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_close_ends_the_workers(make):
    """Torch waits five seconds at exit for each worker that nobody ended: a minute for twelve."""
    before = set(multiprocessing.active_children())
    loader = make(num_workers=2, packing=True, gbs=2, mbs=1)
    keys(loader, 3)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) == before


class LockThatIsTakenLate:
    """A worker's lock: its main thread takes it late, except in worker 0, so that commands come first."""

    def __init__(self) -> None:
        self._lock = RLOCK()

    def acquire(self) -> bool:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id and threading.current_thread() is threading.main_thread():
            time.sleep(0.3)
        return self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


RLOCK = threading.RLock


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_state_waits_for_workers_that_have_only_just_begun(make, monkeypatch):
    settings = {"num_workers": 3, "gbs": 2, "mbs": 1}
    loader = make(**settings)
    module = types.SimpleNamespace(**vars(threading) | {"RLock": LockThatIsTakenLate})
    monkeypatch.setattr("megatron.energon.savable_loader.threading", module)
    keys(loader, 1)
    state = loader.state_dict()
    expected = keys(loader, 4)
    loader.close()
    monkeypatch.undo()
    other = make(**settings)
    other.load_state_dict(json.loads(json.dumps(state)))
    assert keys(other, 4) == expected
    other.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 7, 40])
def test_workers_resume_exactly_wherever_they_stood(make, workers, packing, at):
    """Whole batches, not only keys, from any point of a pass or beyond it; also a second time from the same state."""
    settings = {"num_workers": workers, "packing": packing, "gbs": 2, "mbs": 1}
    loader = make(**settings)
    keys(loader, at)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = list(itertools.islice(loader, 6))
    loader.close()
    for _ in range(2):
        other = make(**settings)
        other.load_state_dict(state)
        for batch, wanted in zip(itertools.islice(other, 6), expected, strict=True):
            assert batch.sample_keys == wanted.sample_keys
            assert torch.equal(batch.input_ids, wanted.input_ids)
            assert torch.equal(batch.position_ids, wanted.position_ids)
        other.close()


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"packing": True}, {"shuffle_buffer_size": 3}])
def test_state_of_other_workers_or_buffers_is_refused_by_name(make, changes):
    state = make(mbs=1).state_dict()
    [(name, value)] = changes.items()
    with pytest.raises(DataError, match=f"{name} = {value}"):
        make(mbs=1, **changes).load_state_dict(state)


def test_state_of_another_layout_is_refused(make):
    state = make().state_dict()
    with pytest.raises(DataError, match=r"seed = 7"):
        make(seed=7).load_state_dict(state)
    with pytest.raises(DataError, match=r"data_parallel_size = 2"):
        make(size=2).load_state_dict(state)


def test_held_out_set_has_one_order_for_every_number_of_ranks(make):
    one = [key for batch in make("val", mbs=1) for key in batch.sample_keys]
    assert one == [f"val-{i:06d}" for i in range(24)]
    two = [
        [key for batch in make("val", rank=rank, size=2, mbs=1) for key in batch.sample_keys]
        for rank in range(2)
    ]
    assert [key for pair in zip(*two, strict=True) for key in pair] == one


def test_blank_images_keep_every_shape(make):
    for seen, blank in zip(itertools.islice(make(), 4), make(blank_images=True), strict=False):
        assert torch.equal(seen.input_ids, blank.input_ids)
        assert torch.equal(seen.position_ids, blank.position_ids)
        if seen.pixel_values is not None:
            assert seen.pixel_values.shape == blank.pixel_values.shape
            assert not blank.pixel_values.any()
            assert seen.pixel_values.any()


def test_padding_to_max_length(make):
    assert next(make(padding="max_length")).input_ids.shape == (2, 256)


def corrupted(count, broken):
    """Scenes of which some have a broken image."""
    result = []
    for index, (key, members) in enumerate(scenes(count)):
        if index in broken:
            members = {"json": members["json"], **{name: b"x" for name in members if name != "json"}}
        result.append((key, members))
    return result


def test_bad_samples_are_skipped_counted_and_named(make, tmp_path):
    text_only = [i for i, (_, members) in enumerate(scenes(60)) if len(members) == 1]
    broken = [i for i in (3, 17, 40) if i not in text_only]
    folder = write(tmp_path / "data", corrupted(60, broken))
    loader = make(dataset=folder, mbs=1, gbs=4, max_skipped_fraction=0.2, shuffle_buffer_size=1)
    seen = {key for batch in keys(loader, 57) for key in batch}
    assert len(seen) == 60 - len(broken)
    assert {(s["key"], s["file"]) for s in loader.skipped} == {
        (f"train-{i:06d}", f"train-{i // 20:06d}.tar") for i in broken
    }
    assert {s["reason"] for s in loader.skipped} <= {"corrupt image", "corrupt video"}
    assert loader.num_read >= 60


def test_run_stops_when_too_many_are_skipped(make, tmp_path):
    folder = write(tmp_path / "data", corrupted(60, range(0, 60, 4)))
    loader = make(dataset=folder, mbs=1, gbs=4, max_skipped_fraction=0.05)
    with pytest.raises(DataError, match="too many samples skipped"):
        keys(loader, 200)


def test_wholly_rejected_dataset_ends_at_once_with_reasons(make, tmp_path):
    folder = write(tmp_path / "data", [(k, {"json": b'{"messages": []}'}) for k, _ in scenes(40)])
    with pytest.raises(DataError, match=r"(?s)no usable sample among the first 32.*bad json: 32"):
        next(make(dataset=folder))


def test_over_length_policies(make):
    loader = make(seq_length=40, max_skipped_fraction=1.0)
    assert max(batch.input_ids.shape[1] for batch in itertools.islice(loader, 10)) <= 40
    assert "over length" in {sample["reason"] for sample in loader.skipped}
    with pytest.raises(DataError, match="unusable sample: over length"):
        keys(make(seq_length=40, over_length="error"), 40)
    cut = make(seq_length=48, over_length="truncate", max_skipped_fraction=1.0)
    for batch in itertools.islice(cut, 20):
        assert batch.input_ids.shape[1] <= 48
        assert batch.num_supervised_tokens > 0


def test_shard_damaged_after_indexing_is_survived(make, tmp_path):
    folder = write(tmp_path / "data", scenes(60))
    tar = folder / "train-000001.tar"
    with tarfile.open(tar) as opened:
        cut = opened.getmembers()[20].offset_data + 5
    tar.write_bytes(tar.read_bytes()[:cut])
    loader = make(dataset=folder, mbs=1, gbs=4, max_skipped_fraction=1.0)
    keys(loader, 40)
    assert {sample["reason"] for sample in loader.skipped} == {"unreadable tar"}
    assert {sample["file"] for sample in loader.skipped} == {"train-000001.tar"}


def test_packing_needs_micro_batch_size_one(make):
    with pytest.raises(ConfigError, match="a pack is a micro-batch"):
        make(packing=True)


def test_missing_and_unprepared_datasets_are_named(make, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        make(dataset=tmp_path / "nowhere")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.json"), io.BytesIO())
    with pytest.raises(DataError, match=r"(?s)no index.*qwen-harness data index"):
        make(dataset=tmp_path)


def test_more_ranks_than_samples_is_refused(make, tmp_path):
    folder = write(tmp_path / "data", scenes(3))
    with pytest.raises(DataError, match="smaller than its streams"):
        make(dataset=folder, size=4, gbs=8)
