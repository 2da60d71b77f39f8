# SPDX-License-Identifier: Apache-2.0
"""Answers from a Hugging Face folder, by transformers, with a key-value cache."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar
from transformers.video_utils import VideoMetadata

from models.common.partial_models import partial_model
from models.common.processing import DEFAULT_VIDEO_FPS, DecodedVideo
from models.contract.architecture import Architecture
from models.contract.errors import ConfigError
from models.contract.families import family_part, load_architecture
from models.datasets.sample import Sample
from models.generation.decoding import decode_media
from models.generation.request import Answer, GenerationOptions, check_context, check_modalities
from models.generation.sampling import make_generators, sampling_scores
from models.generation.tokens import decode_text, end_tokens, pad_token, render_prompt

logger = logging.getLogger(__name__)

OnToken = Callable[[Sequence[int]], None]
"""Called with the next token of every row of the batch, in order."""

LEFT_PADDED = ("input_ids", "attention_mask", "mm_token_type_ids")
FRAME_PADDED = ("input_features", "feature_attention_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersEngine:
    """A loaded checkpoint."""

    folder: Path
    architecture: Architecture
    model: Any
    processor: Any
    device: torch.device
    end_tokens: tuple[int, ...]


def load_transformers_engine(
    folder: Path, processor: Any, *, device: torch.device, dtype: torch.dtype
) -> TransformersEngine:
    """Load a Hugging Face folder; nothing is looked up on a network.

    Args:
        folder: Config and weights.
        processor: From :func:`models.common.processing.load_processor`.
        device: Where it runs.
        dtype: Number format of weights and activations.

    Raises:
        ConfigError: unknown architecture, or weights that transformers cannot load.
    """
    architecture = load_architecture(folder)
    partial = partial_model(architecture)
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.update(partial.changes)
        model = AutoModelForMultimodalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            "the checkpoint's weights cannot be loaded",
            where=str(folder),
            got=str(error).strip().splitlines()[0][:300],
            fix="check it with `qwen-harness convert verify`, or copy it again",
        ) from None
    model = model.get_submodule(partial.part).to(device).eval()
    ends = end_tokens(folder, processor)
    model.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=pad_token(processor))
    return TransformersEngine(
        folder=folder,
        architecture=architecture,
        model=model,
        processor=processor,
        device=device,
        end_tokens=ends,
    )


@torch.inference_mode()
def generate(
    engine: TransformersEngine,
    requests: Sequence[Sample],
    options: GenerationOptions,
    *,
    blank: bool = False,
    on_token: OnToken | None = None,
) -> list[Answer]:
    """Answer one batch of requests.

    Args:
        engine: The loaded checkpoint.
        requests: At least one; they run as one batch, left-padded.
        options: How.
        blank: Show media without their content.
        on_token: Called after every step.

    Raises:
        DataError: a medium does not decode, a modality the family lacks, a prompt longer than the context.
    """
    check_modalities(
        requests, engine.architecture, family_part(engine.architecture.family, "data").MEDIA_KINDS
    )
    encoded = [encode_request(request, engine.processor, blank=blank) for request in requests]
    limit = engine.architecture.text.max_position_embeddings
    lengths = [inputs["input_ids"].shape[1] for inputs in encoded]
    for request, length in zip(requests, lengths, strict=True):
        check_context(request, length, limit)
    inputs = left_pad(encoded, pad_token(engine.processor))
    scores = _Sampler(make_generators([request.key for request in requests], options.seed), options)
    width = max(lengths)
    output = engine.model.generate(
        **{name: to_model(value, engine) for name, value in inputs.items()},
        max_new_tokens=min(options.max_new_tokens, limit - width),
        do_sample=False,
        logits_processor=LogitsProcessorList([scores]),
        streamer=None if on_token is None else _Streamer(on_token),
    )
    new = output[:, width:].tolist()
    return [
        make_answer(request, tokens, length, engine.processor, engine.end_tokens)
        for request, tokens, length in zip(requests, new, lengths, strict=True)
    ]


def make_answer(
    request: Sample, tokens: Sequence[int], num_prompt_tokens: int, processor: Any, ends: Sequence[int]
) -> Answer:
    """Cut a row of new tokens after its end token and decode it."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), None)
    kept = tuple(tokens) if stop is None else tuple(tokens[: stop + 1])
    return Answer(
        key=request.key,
        text=decode_text(processor, kept),
        token_ids=kept,
        num_prompt_tokens=num_prompt_tokens,
        is_finished=stop is not None,
    )


def encode_request(request: Sample, processor: Any, *, blank: bool) -> dict[str, Tensor]:
    """Inputs of one request as the checkpoint's own processor makes them, batch size 1."""
    decoded = decode_media(request, processor, blank=blank)
    text = render_prompt(processor, request)
    arguments: dict[str, Any] = {}
    images = [content for medium, content in decoded if medium.kind == "image"]
    videos = [content for _, content in decoded if isinstance(content, DecodedVideo)]
    audios = [content for medium, content in decoded if medium.kind == "audio"]
    if images:
        arguments["images"] = images
    if videos:
        arguments |= _video_arguments(videos, processor)
    if audios:
        arguments["audio"] = audios
    outputs = processor(text=[text], return_tensors="pt", **arguments)
    if "video_second_per_grid" in outputs:
        outputs["video_second_per_grid"] = _seconds_per_grid(videos, processor)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _video_arguments(videos: Sequence[DecodedVideo], processor: Any) -> dict[str, Any]:
    if len({video.is_sampled for video in videos}) > 1:
        raise ConfigError(
            "video files and frame folders in one request", fix="give all videos of a request in one form"
        )
    metadata = [
        VideoMetadata(
            total_num_frames=len(video.frames), fps=video.fps, frames_indices=list(range(len(video.frames)))
        )
        for video in videos
    ]
    arguments: dict[str, Any] = {
        "videos": [video.frames for video in videos],
        "video_metadata": metadata,
        "do_sample_frames": not videos[0].is_sampled,
    }
    sampler = processor.video_processor
    if sampler.fps is None and sampler.num_frames is None:  # transformers wants one of them said
        arguments["fps"] = DEFAULT_VIDEO_FPS
    return arguments


def _seconds_per_grid(videos: Sequence[DecodedVideo], processor: Any) -> Tensor:
    """Seconds that a temporal patch of each video lasts, float32.

    The processor of Qwen3-Omni takes one frame a second for granted, whatever rate its own sampler has (transformers
    5.17), which would let films run at half speed.
    """
    sampler = processor.video_processor
    rates = [video.fps if video.is_sampled else sampler.fps or DEFAULT_VIDEO_FPS for video in videos]
    return torch.tensor([sampler.temporal_patch_size / rate for rate in rates])


def left_pad(encoded: Sequence[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Join inputs of single requests into one batch: sequences are padded on the left, media follow one another."""
    width = max(inputs["input_ids"].shape[1] for inputs in encoded)
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for inputs in encoded for name in inputs):
        parts = [inputs[name] for inputs in encoded if name in inputs]
        if name in LEFT_PADDED:
            fill = pad if name == "input_ids" else 0
            parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0), value=fill) for part in parts]
        elif name in FRAME_PADDED:
            frames = max(part.shape[-1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, frames - part.shape[-1])) for part in parts]
        joined[name] = torch.cat(parts)
    return joined


def to_model(value: Tensor, engine: TransformersEngine) -> Tensor:
    """An input on the model's device; numbers that are not whole in the model's format."""
    dtype = engine.model.dtype if value.is_floating_point() else value.dtype
    return value.to(engine.device, dtype)


class _Sampler(LogitsProcessor):
    """Turns logits into scores whose argmax is the sampled token."""

    def __init__(self, generators: Sequence[torch.Generator], options: GenerationOptions) -> None:
        self.generators, self.options = generators, options

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return sampling_scores(scores, self.generators, self.options)


class _Streamer(BaseStreamer):
    """Hands on the tokens of every step; the first call holds the prompt."""

    def __init__(self, on_token: OnToken) -> None:
        self.on_token, self.is_prompt = on_token, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.on_token(value.tolist())
        self.is_prompt = False

    def end(self) -> None:
        return
