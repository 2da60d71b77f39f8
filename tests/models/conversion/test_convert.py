# SPDX-License-Identifier: Apache-2.0
"""Round trips and everything that must be refused. Oracles: the source's bytes, and the safetensors library."""

import filecmp
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.contract.errors import ConfigError, HarnessError, RunError, WeightMappingError
from models.contract.tiny_config import tiny_config
from models.conversion import convert, job, sinks
from models.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from models.conversion.dcp_folder import open_dcp
from models.conversion.tensor_source import TensorSpec
from models.conversion.tiny import write_tiny_checkpoint
from models.entry.convert import main

KINDS = [("qwen2_5_vl", False), ("qwen3_vl", False), ("qwen3_vl", True), ("qwen3_omni", True)]
SHARD = "model-00001-of-00002.safetensors"
OTHER_SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded")
    return {
        kind: write_tiny_checkpoint(
            folder / f"{kind[0]}-{kind[1]}", kind[0], moe=kind[1], init="coded", dtype=torch.bfloat16
        )
        for kind in KINDS
    }


@pytest.fixture
def source(coded, tmp_path) -> Path:
    return Path(shutil.copytree(coded["qwen3_vl", True], tmp_path / "source"))


def same_files(left: Path, right: Path) -> bool:
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    if names != sorted(str(path.relative_to(right)) for path in right.rglob("*") if path.is_file()):
        return False
    return not any(filecmp.cmpfiles(left, right, names, shallow=False)[1:])


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{'moe' if kind[1] else 'dense'}")
def test_round_trip_gives_the_same_bytes(coded, tmp_path, kind, monkeypatch) -> None:
    workers = 1 if kind == KINDS[0] else 3
    monkeypatch.setattr(sinks, "BLOCK_BYTES", 2**14)  # cut every tensor, and use several files
    monkeypatch.setattr(sinks, "FILE_BYTES", 2**19)
    summary = hf_to_megatron(coded[kind], tmp_path / "megatron", Options(workers=workers))
    assert summary.complete
    assert summary.num_files > 1
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", coded[kind], Options(workers=workers))
    assert same_files(coded[kind], tmp_path / "hf")


@pytest.fixture
def other_thread():
    """A thread beside the test's own, as a progress bar has one: Python warns of forking then."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("other_thread")
def test_two_workers_write_the_same_bytes_as_one(coded, tmp_path, monkeypatch, recwarn) -> None:
    monkeypatch.setattr(sinks, "FILE_BYTES", 2**17)
    write = sinks._write_checked
    for workers in (1, 2):
        notes, advanced = tmp_path / f"processes-{workers}", []

        def noting(*arguments, notes=notes) -> None:
            with notes.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            write(*arguments)

        monkeypatch.setattr(sinks, "_write_checked", noting)
        options = Options(workers=workers, advance=advanced.append)
        summary = hf_to_megatron(coded["qwen3_vl", True], tmp_path / str(workers), options)
        assert sum(advanced) == summary.num_bytes
        processes = set(notes.read_text().split())
        assert (len(processes), str(os.getpid()) in processes) == (workers, workers == 1)
    assert same_files(tmp_path / "1", tmp_path / "2")
    assert not [warning for warning in recwarn if "fork" in str(warning.message)]


def test_torch_dist_holds_what_the_table_says(coded, tmp_path) -> None:
    hf_to_megatron(coded["qwen3_vl", True], tmp_path / "m", Options())
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release"
    tensors = {}
    for file in coded["qwen3_vl", True].glob("*.safetensors"):
        tensors |= load_file(file)
    layer = "model.language_model.layers.2."
    q, k, v = (tensors[f"{layer}self_attn.{part}_proj.weight"].reshape(2, -1, 80) for part in "qkv")
    with open_dcp(tmp_path / "m" / "release") as folder:
        key = "language_model.decoder.layers.2."
        qkv = folder.read(f"{key}self_attention.linear_qkv.weight", 0, 160)
        fc1 = folder.read(f"{key}mlp.experts.experts.linear_fc1.weight", 0, 8)
    assert torch.equal(qkv, torch.cat([q, k, v], dim=1).reshape(160, 80))
    assert torch.equal(fc1, tensors[f"{layer}mlp.experts.gate_up_proj"].transpose(1, 2))


def test_layouts_of_experts_convert_to_the_same_checkpoint(coded, source, tmp_path) -> None:
    def turn(tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    for shard in (SHARD, OTHER_SHARD):
        edit(source / shard, turn)
    summary = hf_to_megatron(source, tmp_path / "b", Options())
    assert "fused_transposed" in summary.layout
    megatron_to_hf(tmp_path / "b", tmp_path / "hf", coded["qwen3_vl", True], Options())
    assert same_files(coded["qwen3_vl", True], tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_converts_values(tmp_path, dtype) -> None:
    source = write_tiny_checkpoint(tmp_path / "s", "qwen2_5_vl", init="random")
    hf_to_megatron(source, tmp_path / "m", Options(dtype=dtype))
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options(dtype=dtype))
    for shard in (SHARD, OTHER_SHARD):
        before, after = load_file(source / shard), load_file(tmp_path / "hf" / shard)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor.to(dtype)), name
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    total = sum(
        tensor.nbytes
        for shard in (SHARD, OTHER_SHARD)
        for tensor in load_file(tmp_path / "hf" / shard).values()
    )
    assert index["metadata"]["total_size"] == total


def test_overflow_in_fp16_is_refused(tmp_path) -> None:
    source = write_tiny_checkpoint(tmp_path / "s", "qwen2_5_vl", init="random")
    edit(
        source / SHARD,
        lambda tensors: (
            tensors["model.norm.weight" if "model.norm.weight" in tensors else next(iter(tensors))]
            .view(-1)[:1]
            .fill_(1e6)
        ),
    )
    with pytest.raises(WeightMappingError, match="not finite"):
        hf_to_megatron(source, tmp_path / "m", Options(dtype=torch.float16))
    assert not (tmp_path / "m").exists()


def test_stored_copy_of_a_tied_tensor_is_checked_and_exported(coded, tmp_path) -> None:
    source = Path(shutil.copytree(coded["qwen3_vl", False], tmp_path / "s"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    name = "model.language_model.embed_tokens.weight"
    shard = index["weight_map"][name]
    edit(source / shard, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    index["weight_map"]["lm_head.weight"] = shard
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_to_megatron(source, tmp_path / "m", Options())
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())
    assert same_files(source, tmp_path / "hf")
    edit(source / shard, lambda tensors: tensors["lm_head.weight"][5, 5].fill_(3.0))
    with pytest.raises(WeightMappingError, match="ties two tensors that differ"):
        hf_to_megatron(source, tmp_path / "m2", Options())


def drop_shard(folder: Path) -> None:
    (folder / OTHER_SHARD).unlink()


def cut_shard(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def cut_header(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:20])


def drop_tensor(folder: Path) -> None:
    name = next(name for name in load_file(folder / SHARD) if "norm" in name)
    edit(folder / SHARD, lambda tensors: tensors.pop(name))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop(name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_tensor_not_index(folder: Path) -> None:
    edit(folder / SHARD, lambda tensors: tensors.pop(next(iter(tensors))))


def add_tensor(folder: Path) -> None:
    edit(folder / SHARD, lambda tensors: tensors.update({"extra.weight": torch.ones(3)}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = SHARD
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bend_tensor(folder: Path) -> None:
    name = next(name for name, value in load_file(folder / SHARD).items() if value.dim() == 2)
    edit(folder / SHARD, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny_config("qwen2_5_vl")))


def unknown_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def half_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def whole_numbers(folder: Path) -> None:
    name = next(name for name in load_file(folder / SHARD) if "norm" in name)
    edit(folder / SHARD, lambda tensors: tensors.update({name: tensors[name].to(torch.int64)}))


def half_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text()[:100])


def index_outside(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../model.safetensors")
    file.write_text(json.dumps(index))


BROKEN = {
    drop_shard: "files are missing", cut_shard: "safetensors file is broken", cut_header: "safetensors file is broken",
    drop_tensor: "1 missing", drop_tensor_not_index: "index and the files disagree",
    add_tensor: "1 unexpected: extra.weight",
    bend_tensor: "1 wrong shape", other_family: "does not fit its config.json", unknown_model: "unknown architecture",
    list_config: "not an object", whole_numbers: "1 not floating point",
    half_config: "not valid JSON", half_index: "index is not valid JSON", index_outside: "no usable weight_map",
}  # fmt: skip


@pytest.mark.parametrize(
    ("break_it", "words"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_broken_source_is_refused_before_anything_is_written(source, tmp_path, break_it, words) -> None:
    break_it(source)
    with pytest.raises(HarnessError, match=words):
        hf_to_megatron(source, tmp_path / "m", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_not_finite_is_reported_and_refused_on_demand(source, tmp_path) -> None:
    edit(
        source / SHARD,
        lambda tensors: next(t for t in tensors.values() if t.dim() == 2)[1, 1].fill_(float("nan")),
    )
    assert len(hf_to_megatron(source, tmp_path / "m", Options()).not_finite) == 1
    with pytest.raises(WeightMappingError, match="not finite"):
        hf_to_megatron(source, tmp_path / "m2", Options(finite=True))
    assert not (tmp_path / "m2").exists()


def test_existing_target_is_refused_and_untouched(source, tmp_path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="target exists"):
        hf_to_megatron(source, tmp_path / "m", Options())
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["precious"]


def test_empty_folder_may_be_the_target(source, tmp_path) -> None:
    (tmp_path / "m").mkdir()
    assert hf_to_megatron(source, tmp_path / "m", Options()).complete
    assert (tmp_path / "m" / "release" / ".metadata").is_file()


def test_full_disk_is_refused_before_the_first_byte(source, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="not enough disk space"):
        hf_to_megatron(source, tmp_path / "m", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_disk_that_fills_up_leaves_the_target_alone_and_is_continued(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sinks, "FILE_BYTES", 2**19)
    real, calls = sinks._write_checked, []

    def full(stream, data, path) -> None:
        calls.append(path.name)
        if len(calls) == 60:
            raise OSError(28, "No space left on device")
        real(stream, data, path)

    monkeypatch.setattr(sinks, "_write_checked", full)
    with pytest.raises(RunError, match="disk is full"):
        hf_to_megatron(source, tmp_path / "m", Options(workers=1))
    assert not (tmp_path / "m").exists()
    first = set(calls)
    calls.clear()
    calls.extend(["x"] * 100)
    hf_to_megatron(source, tmp_path / "m", Options(workers=1))
    again = set(calls[100:])
    assert len(first & again) == 1  # only the file that broke was written twice
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())
    assert same_files(source, tmp_path / "hf")


def test_partial_result_of_another_source_is_not_continued(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sinks, "_write_checked", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(RunError):
        hf_to_megatron(source, tmp_path / "m", Options())
    monkeypatch.undo()
    os.utime(source / SHARD)
    with pytest.raises(ConfigError, match="--restart"):
        hf_to_megatron(source, tmp_path / "m", Options())
    assert hf_to_megatron(source, tmp_path / "m", Options(restart=True)).complete


def test_bytes_that_read_back_differently_are_noticed(source, tmp_path, monkeypatch) -> None:
    real = os.preadv

    def flip(handle, buffers, offset) -> int:
        count = real(handle, buffers, offset)
        if ".distcp" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            buffers[0][0] ^= 1
        return count

    monkeypatch.setattr(sinks.os, "preadv", flip)
    with pytest.raises(RunError, match="reads back differently"):
        hf_to_megatron(source, tmp_path / "m", Options(workers=1))
    assert not (tmp_path / "m").exists()


def test_source_that_changes_while_it_is_read_is_noticed(source, tmp_path) -> None:
    def touch(_: int) -> None:
        os.utime(source / SHARD, ns=(1, 1))

    with pytest.raises(WeightMappingError, match="changed while"):
        hf_to_megatron(source, tmp_path / "m", Options(advance=touch))
    assert not (tmp_path / "m").exists()


def test_shares_of_several_nodes_make_one_result(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sinks, "FILE_BYTES", 2**19)
    assert not hf_to_megatron(source, tmp_path / "m", Options(share=(0, 2))).complete
    assert hf_to_megatron(source, tmp_path / "m", Options(share=(1, 2))).complete
    hf_to_megatron(source, tmp_path / "whole", Options())
    for name in ("m", "whole"):
        megatron_to_hf(tmp_path / name, tmp_path / f"{name}-hf", source, Options())
        assert same_files(source, tmp_path / f"{name}-hf")


def test_megatron_checkpoint_of_another_model_is_refused(coded, tmp_path) -> None:
    hf_to_megatron(coded["qwen3_vl", False], tmp_path / "m", Options())
    with pytest.raises(WeightMappingError, match="does not fit the model"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", coded["qwen3_vl", True], Options())
    assert not (tmp_path / "hf").exists()


def test_cut_or_missing_megatron_file_is_refused(coded, tmp_path) -> None:
    source = coded["qwen3_vl", False]
    hf_to_megatron(source, tmp_path / "m", Options())
    file = tmp_path / "m" / "release" / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(WeightMappingError, match="missing or cut off"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())
    file.unlink()
    with pytest.raises(WeightMappingError, match="missing or cut off"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())
    metadata = tmp_path / "m" / "release" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:500])
    with pytest.raises(WeightMappingError, match="checkpoint is broken"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())


def test_metadata_that_would_run_code_is_refused(coded, tmp_path) -> None:
    import pickle

    hf_to_megatron(coded["qwen3_vl", False], tmp_path / "m", Options())
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    (tmp_path / "m" / "release" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(WeightMappingError, match="checkpoint is broken"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", coded["qwen3_vl", False], Options())
    assert not marker.exists()


def test_tracker_that_is_no_text_is_refused(coded, tmp_path) -> None:
    source = coded["qwen3_vl", False]
    hf_to_megatron(source, tmp_path / "m", Options())
    (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightMappingError, match="names a checkpoint that is not there"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())


def test_program_says_in_one_line_that_a_name_is_impossible(source, tmp_path, capsys) -> None:
    assert main(["hf-to-megatron", str(source), str(tmp_path / ("n" * 250))]) == 1
    assert capsys.readouterr().err.strip().splitlines()[0].startswith("OSError")


def test_program_plans_converts_and_reports_errors(source, tmp_path, capsys) -> None:
    target = str(tmp_path / "m")
    assert main(["hf-to-megatron", str(source), target, "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert main(["hf-to-megatron", str(source), target]) == 0
    assert main(["hf-to-megatron", str(source), target]) == 1
    assert capsys.readouterr().err.count("ConfigError: the target exists") == 1
    assert main(["verify", str(source), target, "--out", str(tmp_path / "r" / "conversion.json")]) == 0
    assert json.loads((tmp_path / "r" / "conversion.json").read_text())["is_equal"]
    assert main(["hf-to-megatron", str(source), str(tmp_path / "x"), "--share", "2/2"]) == 1


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(11008, 2048), (3420, 1280), (9728, 2560), (151936, 2048), (18944, 3584), (7, 2**21)],
)
def test_blocks_of_both_halves_of_a_joined_tensor_are_cut_at_the_same_rows(rows: int, columns: int) -> None:
    half, joined = (TensorSpec((count, columns), torch.bfloat16) for count in (rows, 2 * rows))
    spans = [[(span.start, span.stop) for span in sinks.row_blocks("", spec)] for spec in (half, joined)]
    for spec, blocks in zip((half, joined), spans, strict=True):
        assert [row for block in blocks for row in block][1:-1:2] == [start for start, _ in blocks[1:]]
        assert (blocks[0][0], blocks[-1][1]) == (0, spec.num_rows)
        assert all((stop - start) * columns * 2 <= sinks.BLOCK_BYTES for start, stop in blocks)
    starts = {start for start, _ in spans[1]}
    assert rows % 2 or {shift + start for start, _ in spans[0] for shift in (0, rows)} == starts


def test_second_conversion_to_the_same_target_is_refused_and_does_no_harm(source, tmp_path) -> None:
    refused = []

    def second(_: int) -> None:
        if not refused:
            with pytest.raises(ConfigError, match="another process is writing") as error:
                hf_to_megatron(source, tmp_path / "m", Options(workers=1))
            refused.append(error)

    assert hf_to_megatron(source, tmp_path / "m", Options(workers=1, advance=second)).complete
    assert refused
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options())
    assert same_files(source, tmp_path / "hf")


@pytest.mark.parametrize("part", ["talker.", "code2wav."])
def test_export_that_changes_an_untouched_tensor_is_refused(coded, tmp_path, monkeypatch, part) -> None:
    source = coded["qwen3_omni", True]
    hf_to_megatron(source, tmp_path / "m", Options())
    write = convert.write_safetensors

    def changing(file, path, tensors, header, advance) -> dict:
        entry = write(file, path, tensors, header, advance)
        places = json.loads(header)
        for name in [name for name in places if name.startswith(part)][:1]:
            data = bytearray(path.read_bytes())
            data[8 + len(header) + places[name]["data_offsets"][0]] ^= 1
            path.write_bytes(data)
        return entry

    monkeypatch.setattr(convert, "write_safetensors", changing)
    with pytest.raises(WeightMappingError, match=f"training does not touch changed(.|\n)*{part}"):
        megatron_to_hf(tmp_path / "m", tmp_path / "hf", source, Options(workers=1))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", ["inf", "-inf", "nan", "-nan"])
def test_every_kind_of_value_that_is_not_finite_is_found(dtype, bad) -> None:
    largest = torch.finfo(dtype).max
    healthy = torch.tensor([[0.0, -0.0, largest], [-largest, 1.0, torch.finfo(dtype).tiny]], dtype=dtype)
    assert convert.is_finite(healthy)
    assert convert.is_finite(healthy[:0])
    assert convert.is_finite(healthy[0, 0])
    value = torch.tensor(float(bad.lstrip("-")), dtype=dtype)
    for place in ((0, 0), (1, 2)):
        broken = healthy.clone()
        broken[place] = torch.copysign(value, torch.tensor(-1.0 if bad[0] == "-" else 1.0, dtype=dtype))
        assert not convert.is_finite(broken)
        assert not convert.is_finite(broken.T)
