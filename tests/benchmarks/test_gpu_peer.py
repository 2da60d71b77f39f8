# SPDX-License-Identifier: Apache-2.0
"""The table of peers: cases are read and cut for all sides alike, a side that fails costs the others nothing."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import gpu_peer
from benchmarks.gpu_peer import SIDES, SideProcess, make_row, parse_arguments, run_case
from benchmarks.peer_case import PeerCase, cut_config, parse_case
from models.contract.errors import ConfigError
from models.contract.families import architecture_from_hf, published_config, published_names

CASE = PeerCase(model="qwen3_vl_2b", num_images=1, image_size=448)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("qwen3_vl_2b:1x448", CASE),
        (
            "qwen3_vl_30b_a3b:8x512:layers=12",
            PeerCase(model="qwen3_vl_30b_a3b", num_images=8, image_size=512, num_layers=12),
        ),
        (
            "qwen2_5_vl_7b:0x448:samples=4:layers=3",
            PeerCase(model="qwen2_5_vl_7b", num_images=0, image_size=448, num_layers=3, num_samples=4),
        ),
    ],
)
def test_case_is_read(argument: str, expected: PeerCase) -> None:
    assert parse_case(argument) == expected


@pytest.mark.parametrize(
    "argument",
    [
        "qwen3_vl_2b",
        "qwen3_vl_2b:8",
        "qwen3_vl_2b:8x448:layers=0",
        "qwen3_vl_2b:8x448:rows=2",
        "qwen3_vl_2b:8x448:layers=2:layers=3",
    ],
)
def test_case_of_another_form_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="a case cannot be read") as raised:
        parse_case(argument)
    assert "qwen3_vl_30b_a3b:8x448:layers=12:samples=8" in str(raised.value)


def test_command_line_refuses_what_would_fail_later(capsys: pytest.CaptureFixture[str]) -> None:
    cases, sides = parse_arguments(["--sides", "ours,transformers", "qwen3_vl_2b:1x448"])
    assert (cases, sides) == ([CASE], ["ours", "transformers"])
    assert parse_arguments(["qwen3_vl_2b:1x448"])[1] == list(SIDES)
    with pytest.raises(ConfigError, match="unknown published size"):
        parse_arguments(["qwen3_vl_7b:1x448"])
    with pytest.raises(ConfigError, match="cannot be cut to more layers"):
        parse_arguments(["qwen3_vl_2b:1x448:layers=29"])
    with pytest.raises(SystemExit):
        parse_arguments(["--sides", "ours,theirs", "qwen3_vl_2b:1x448"])
    assert "theirs is none of transformers, mcore_bridge, ours" in capsys.readouterr().err


@pytest.mark.parametrize("name", published_names())
def test_cut_keeps_everything_but_the_number_of_layers(name: str) -> None:
    whole, cut = published_config(name), cut_config(published_config(name), 4)
    before, after = architecture_from_hf(whole), architecture_from_hf(cut)
    assert before.text.num_layers > after.text.num_layers == 4
    assert after.vision == before.vision
    assert after.text.hidden_size == before.text.hidden_size


def test_cut_reaches_what_is_listed_by_layer_and_leaves_the_config_it_got() -> None:
    text = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "mlp_only_layers": [1, 3]}
    config = {"text_config": text}
    cut = cut_config(config, 2)["text_config"]
    assert cut == {"num_hidden_layers": 2, "layer_types": ["a", "b"], "mlp_only_layers": [1]}
    assert text["num_hidden_layers"] == 4
    assert len(text["layer_types"]) == 4


def test_row_compares_ours_with_each_peer() -> None:
    results = {
        "transformers": {"ms": 300.0, "gib": 50.1, "loss": 11.9, "device": "GPU"},
        "mcore_bridge": {"ms": 150.0, "gib": 30.5, "loss": 12.0, "device": "GPU"},
        "ours": {"ms": 120.0, "gib": 20.2, "loss": 12.1, "device": "GPU"},
    }
    assert make_row(CASE, results) == {
        "model": "qwen3_vl_2b", "images": "1x448", "seq_length": 8192, "device": "GPU",
        "transformers_ms": 300.0, "transformers_gib": 50.1, "transformers_loss": 11.9,
        "mcore_bridge_ms": 150.0, "mcore_bridge_gib": 30.5, "mcore_bridge_loss": 12.0,
        "ours_ms": 120.0, "ours_gib": 20.2, "ours_loss": 12.1,
        "times_faster_than_transformers": 2.5, "times_faster_than_mcore_bridge": 1.25,
    }  # fmt: skip


def test_row_says_why_a_side_has_no_figures() -> None:
    results = {"transformers": {"ms": 300.0}, "mcore_bridge": {"error": "No module"}, "ours": {"ms": 200.0}}
    row = make_row(CASE, results)
    assert row["mcore_bridge_ms"] == "No module"
    assert row["times_faster_than_transformers"] == 1.5
    assert "times_faster_than_mcore_bridge" not in row
    assert not [key for key in make_row(CASE, results | {"ours": {"error": "x"}}) if "times" in key]


def test_packed_and_cut_rows_say_so() -> None:
    case = parse_case("qwen3_vl_2b:8x448:layers=12:samples=4")
    row = make_row(case, {"transformers": {"ms": 1.0}})
    assert (row["layers"], row["samples"]) == (12, 4)
    assert row["transformers_rows"] == "4 samples as a batch, not packed"
    assert "transformers_rows" not in make_row(case, {"ours": {"ms": 1.0}})


def pretend(side: str, case: PeerCase) -> dict[str, Any]:
    """A side that answers with its process; the number of images chooses what goes wrong."""
    if side == "transformers" and case.num_images == 1:
        raise RuntimeError("out of memory")
    if side == "mcore_bridge" and case.num_images == 1:
        os._exit(7)
    if side == "mcore_bridge" and case.num_images == 2:
        time.sleep(60)
    sys.stdout.write("not a row\n")
    return {"ms": 1.0, "pid": os.getpid()}


def test_side_that_fails_costs_the_others_nothing_and_starts_anew(capfd: pytest.CaptureFixture[str]) -> None:
    sides = [SideProcess(name, pretend, timeout_s=20) for name in SIDES]
    try:
        answers = [
            {side.side: side.time(parse_case(f"qwen3_vl_2b:{images}x448")) for side in sides}
            for images in (3, 1, 3)
        ]
        row = run_case(parse_case("qwen3_vl_2b:1x448"), sides)
        sides[1]._timeout_s = 1.0
        late = sides[1].time(parse_case("qwen3_vl_2b:2x448"))
    finally:
        for side in sides:
            side.stop()
    first, broken, again = answers
    assert broken["transformers"] == {"error": "RuntimeError: out of memory"}
    assert broken["mcore_bridge"] == {"error": "its process ended with exit code 7"}
    assert first["ours"] == broken["ours"] == again["ours"]
    assert first["transformers"]["ms"] == again["transformers"]["ms"] == 1.0
    assert first["transformers"]["pid"] != again["transformers"]["pid"]
    assert row["ours_ms"] == 1.0
    assert row["transformers_ms"] == "RuntimeError: out of memory"
    assert late == {"error": "no answer in 1 s"}
    out, err = capfd.readouterr()
    assert out == ""
    assert "not a row" in err


@pytest.fixture
def megatron() -> Iterator[None]:
    """One gloo process with megatron-core's groups, as the benchmark starts them, on the CPU."""
    from benchmarks.gpu_step import case_parser, make_recipe
    from models.contract.families import published_architecture
    from models.contract.launcher import read_launcher_environment
    from models.training.cpu import cpu_megatron
    from models.training.parallel import start_megatron, stop_distributed

    options = case_parser().parse_args([])
    recipe = make_recipe(options, 1, published_architecture(options.model))
    with cpu_megatron():
        start_megatron(recipe, read_launcher_environment({}), timeout_s=60)
        yield
        stop_distributed()


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_both_sides_have_the_same_loss_when_cut_and_packed(name: str) -> None:
    # Worst measured over three draws: 1.7e-7 of the loss. A layer less was above 2e-3, attention across samples 4e-4.
    import torch

    from benchmarks.peer_models import build_ours, build_transformers, ready_ours, ready_transformers
    from models.contract.families import family_part
    from models.datasets.fixed_shapes import RowShape, fixed_batch
    from models.parity.compare import load, to_megatron
    from models.parity.oracles import TINY, build_oracle, hf_config_of, named_tensors

    cpu = torch.device("cpu")
    config = hf_config_of(name, build_oracle(name)) | {"architectures": [TINY[name].model_class]}
    config = cut_config(config, 3)
    peer = build_transformers(config, cpu, torch.float32)
    ours = build_ours(config, cpu, torch.float32)
    assert len(peer.model.language_model.layers) == len(ours.language_model.decoder.layers) == 3
    architecture = architecture_from_hf(config)
    rules = family_part(architecture.family, "weights").weight_table(architecture, TINY[name].layout)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in peer.parameters():
            draw = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.15 * draw if weight.ndim > 1 else 1 + 0.3 * draw)
        load(ours, to_megatron(named_tensors(name, dict(peer.named_parameters())), rules))
    for samples in (1, 4):
        shape = RowShape(seq_length=96, num_images=4, image_size=24, num_samples=samples)
        batch = fixed_batch(architecture, shape)
        theirs = ready_transformers(peer, batch)()
        theirs.backward()
        assert ready_ours(ours, batch)().item() == pytest.approx(theirs.item(), rel=1e-5)


def test_names_of_the_sides_agree_and_a_peer_that_is_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from benchmarks import peer_models

    assert tuple(peer_models.SIDES) == SIDES
    monkeypatch.setitem(sys.modules, "mcore_bridge", None)
    with pytest.raises(ModuleNotFoundError, match="mcore_bridge"):
        peer_models.build_mcore_bridge(published_config("qwen3_vl_2b"), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("argument", "said"),
    [("qwen3_vl_2b:1y448", "a case cannot be read"), ("qwen3_vl_2b:1x448", "CUDA device")],
)
def test_what_cannot_be_timed_is_told_at_once(
    argument: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_peer, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_peer", argument])
    with pytest.raises(SystemExit, match=said):
        gpu_peer.main()
