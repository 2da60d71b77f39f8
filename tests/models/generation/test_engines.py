# SPDX-License-Identifier: Apache-2.0
"""Our model and transformers must say the same, token for token, on tiny random checkpoints of every family."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.contract.architecture import Family
from models.contract.errors import ConfigError, DataError
from models.contract.site import Site
from models.conversion.convert import Options, hf_to_megatron
from models.conversion.tiny import write_tiny_checkpoint
from models.datasets.sample import Medium, Sample, Turn, parse_sample
from models.datasets.scenes import iter_scenes
from models.entry.generation_engine import Opened, locate, open_checkpoint
from models.generation import megatron_engine
from models.generation.request import Answer, GenerationOptions, requests_of_sample

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl")
GREEDY = GenerationOptions(max_new_tokens=8)
SAMPLED = GenerationOptions(max_new_tokens=6, temperature=0.9, top_k=100, top_p=0.95, seed=7)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint") / request.param
    return write_tiny_checkpoint(target, request.param, init="random", seed=3)


@pytest.fixture(scope="module")
def requests() -> list[Sample]:
    """One request of each kind of scene: no medium, one image, two images, a video; lengths differ."""
    wanted = {"text", "caption", "pair", "video", "count"}
    found = {}
    for scene in iter_scenes(80, split="val"):
        if scene.kind in wanted and scene.kind not in found:
            sample = parse_sample({"__key__": scene.key, **scene.members()})
            *_, (found[scene.kind], _, _) = requests_of_sample(sample)
    assert set(found) == wanted
    return list(found.values())


def opened(folder: Path, engine: str) -> Iterator[Opened]:
    source = locate(str(folder), hf_folder=None, site=Site())
    with open_checkpoint(source, engine=engine, dtype="auto") as loaded:  # pyright: ignore[reportArgumentType]
        yield loaded


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Opened]:
    yield from opened(folder, "transformers")


@pytest.fixture(scope="module")
def native(folder: Path) -> Iterator[Opened]:
    yield from opened(folder, "megatron")


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_our_model_says_what_transformers_says(
    reference: Opened, native: Opened, requests: list[Sample], options: GenerationOptions
) -> None:
    expected = reference.generate(requests, options)
    assert native.generate(requests, options) == expected
    assert len(set(tokens(expected))) == len(requests)  # they do not all say the same


def test_answers_do_not_depend_on_the_batch(reference: Opened, requests: list[Sample]) -> None:
    together = reference.generate(requests, SAMPLED)
    assert [reference.generate([request], SAMPLED)[0] for request in requests] == together


def test_blanked_pictures_change_answers(reference: Opened, native: Opened, requests: list[Sample]) -> None:
    shown = [request for request in requests if request.media]
    blanked = reference.generate(shown, GREEDY, blank=True)
    assert tokens(blanked) != tokens(reference.generate(shown, GREEDY))
    assert native.generate(shown, GREEDY, blank=True) == blanked


def test_a_wrong_position_of_new_tokens_is_noticed(
    reference: Opened, native: Opened, requests: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = megatron_engine.append_token

    def stuck(sample, token):  # type: ignore[no-untyped-def]
        longer = append(sample, token)
        position_ids = longer.position_ids.clone()
        position_ids[:, -1] = position_ids[:, -2]
        return dataclasses.replace(longer, position_ids=position_ids)

    monkeypatch.setattr(megatron_engine, "append_token", stuck)
    assert native.generate(requests, GREEDY) != reference.generate(requests, GREEDY)


def test_tokens_are_streamed_as_they_come(reference: Opened, native: Opened, requests: list[Sample]) -> None:
    for engine in (reference, native):
        seen: list[int] = []
        (answer,) = engine.generate(requests[:1], GREEDY, on_token=seen.extend)
        assert tuple(seen) == answer.token_ids


def test_megatron_checkpoint_answers_like_the_folder_it_came_from(
    folder: Path, reference: Opened, requests: list[Sample], tmp_path: Path
) -> None:
    hf_to_megatron(folder, tmp_path / "megatron", Options())
    expected = reference.generate(requests[:2], GREEDY)
    source = locate(str(tmp_path / "megatron"), hf_folder=folder, site=Site())
    with open_checkpoint(source, engine="auto", dtype="auto") as exported:
        assert exported.generate(requests[:2], GREEDY) == expected
    with open_checkpoint(source, engine="megatron", dtype="auto") as ours:
        assert ours.generate(requests[:2], GREEDY) == expected


def request_of(kind: str, data: bytes = b"junk") -> Sample:
    return Sample("bad", "", (Turn("user", f"<{kind}>\nWhat?"),), (Medium(kind, f"a.{kind}", (data,)),))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_medium_that_does_not_decode_is_named(reference: Opened, native: Opened, kind: str) -> None:
    for engine in (reference, native):
        with pytest.raises(DataError, match=rf"{kind} does not decode[\s\S]*a\.{kind}"):
            engine.generate([request_of(kind)], GREEDY)


def test_audio_is_refused_before_the_weights_are_read(folder: Path) -> None:
    with pytest.raises(DataError, match="takes no audio"):
        locate(str(folder), hf_folder=None, site=Site(), requests=[request_of("audio")])


def test_a_prompt_longer_than_the_context_is_refused(reference: Opened, native: Opened) -> None:
    limit = reference.engine.architecture.text.max_position_embeddings
    long = Sample("long", "", (Turn("user", "red " * limit),))
    for engine in (reference, native):
        with pytest.raises(DataError, match="longer than the context"):
            engine.generate([long], GREEDY)


def test_a_checkpoint_without_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("tokenizer.json", "vocab.json"):
        (copy / name).unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        locate(str(copy), hf_folder=None, site=Site())


def test_end_token_stops_an_answer(
    folder: Path, reference: Opened, requests: list[Sample], tmp_path: Path
) -> None:
    (plain,) = reference.generate(requests[:1], GREEDY)
    stop = plain.token_ids[2]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    cut = plain.token_ids[: plain.token_ids.index(stop) + 1]
    for engine in ("transformers", "megatron"):
        source = locate(str(copy), hf_folder=None, site=Site())
        with open_checkpoint(source, engine=engine, dtype="auto") as loaded:  # pyright: ignore[reportArgumentType]
            (answer,) = loaded.generate(requests[:1], GREEDY)
        assert (answer.token_ids, answer.is_finished) == (cut, True)


def test_logits_are_those_behind_the_last_real_token(native: Opened, requests: list[Sample]) -> None:
    """Right padding of shorter rows must not be read."""
    engine = native.engine
    prompts = [megatron_engine.encode_prompt(request, engine, blank=False) for request in requests]
    with torch.no_grad():
        together = megatron_engine._next_logits(engine, prompts)
        alone = torch.cat([megatron_engine._next_logits(engine, [prompt]) for prompt in prompts])
    # measured worst case 4e-6: sums in another order
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0.0)
