# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni with pictures, films and sounds: token for token what transformers says, from Megatron's format, too."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models.common.processing import load_processor
from models.contract.errors import DataError
from models.contract.families import load_architecture
from models.contract.site import Site
from models.conversion.convert import Options, hf_to_megatron
from models.conversion.tiny import write_tiny_checkpoint
from models.entry.generation_engine import locate, open_checkpoint
from models.generation.logits import fixed_batch
from models.generation.request import GenerationOptions, request_from_files
from models.generation.transformers_engine import encode_request

GREEDY = GenerationOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("omni") / "hf"
    return write_tiny_checkpoint(target, "qwen3_omni", init="random", seed=3)


@pytest.mark.slow
def test_every_medium_gives_the_tokens_of_transformers(folder: Path, tmp_path: Path) -> None:
    requests = fixed_batch(("image", "video", "audio"))
    assert {medium.kind for request in requests for medium in request.media} == {"image", "video", "audio"}
    hf_to_megatron(folder, tmp_path / "megatron", Options())
    source = locate(str(folder), hf_folder=None, site=Site())
    with open_checkpoint(source, engine="transformers", dtype="fp32") as reference:
        expected = reference.generate(requests, GREEDY)
    converted = locate(str(tmp_path / "megatron"), hf_folder=folder, site=Site())
    with open_checkpoint(converted, engine="megatron", dtype="fp32") as native:
        assert native.generate(requests, GREEDY) == expected
    assert len({answer.token_ids for answer in expected}) > 2


def test_a_film_runs_at_its_own_speed(folder: Path) -> None:
    """The processor's sampler takes two frames a second, and a temporal patch holds two: one second."""
    processor = load_processor(folder, load_architecture(folder).vision)
    (film,) = [r for r in fixed_batch(("video",)) if any(medium.kind == "video" for medium in r.media)]
    seconds = encode_request(film, processor, blank=False)["video_second_per_grid"]
    assert torch.equal(seconds, torch.tensor([1.0]))


def test_a_sound_shorter_than_a_window_is_refused(folder: Path, tmp_path: Path) -> None:
    processor = load_processor(folder, load_architecture(folder).vision)
    soundfile.write(tmp_path / "click.wav", np.zeros(200), 16000)
    request = request_from_files("What is heard?", audios=[tmp_path / "click.wav"])
    with pytest.raises(DataError, match="audio too short"):
        encode_request(request, processor, blank=False)
    soundfile.write(tmp_path / "click.wav", np.zeros(201), 16000)
    encode_request(
        request_from_files("What is heard?", audios=[tmp_path / "click.wav"]), processor, blank=False
    )
