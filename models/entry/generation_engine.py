# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint for generation: finds it, exports or builds it, and gives one way to ask it."""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models.common.processing import load_processor
from models.common.settings import DTYPES, ModelSettings, resolve_attention_backend
from models.contract.errors import ConfigError
from models.contract.families import family_part, load_architecture
from models.contract.site import Site
from models.datasets.sample import Sample
from models.generation import megatron_engine, transformers_engine
from models.generation.checkpoint import CheckpointSource, fingerprint, resolve_checkpoint
from models.generation.request import Answer, GenerationOptions, check_modalities
from models.generation.tokens import check_tokenizer, decode_text, end_tokens

logger = logging.getLogger(__name__)

EngineName = Literal["transformers", "megatron"]
OnToken = Callable[[Sequence[int]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint that can be asked."""

    engine: Any
    engine_name: EngineName
    source: CheckpointSource
    fingerprint: str

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.engine.architecture.family

    def generate(
        self, requests: Sequence[Sample], options: GenerationOptions, *, blank: bool = False,
        on_token: OnToken | None = None,
    ) -> list[Answer]:  # fmt: skip
        """Answer one batch; see the engines."""
        run = {"transformers": transformers_engine.generate, "megatron": megatron_engine.generate}[
            self.engine_name
        ]
        return run(self.engine, requests, options, blank=blank, on_token=on_token)

    def terminal_writer(self) -> OnToken:
        """Writes the tokens of a single request to stdout as text, whole characters at a time."""
        tokens: list[int] = []
        shown = ""

        def write(new: Sequence[int]) -> None:
            nonlocal shown
            tokens.append(new[0])
            text = decode_text(self.engine.processor, tokens)
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text

        return write


def locate(
    name: str, *, hf_folder: Path | None, site: Site, requests: Sequence[Sample] = ()
) -> CheckpointSource:
    """Find a checkpoint and refuse what can be refused before its weights are read.

    Args:
        name: Path, or a name that the site knows.
        hf_folder: Config and tokenizer of a Megatron checkpoint without its own.
        site: Where named checkpoints are.
        requests: Their media must be of kinds that the family takes.

    Raises:
        ConfigError: no checkpoint, an unknown architecture, no tokenizer.
        DataError: a modality the family lacks.
    """
    source = resolve_checkpoint(site.checkpoint(name), hf_folder=hf_folder, site=site)
    architecture = load_architecture(source.hf_folder)
    check_tokenizer(source.hf_folder)
    check_modalities(requests, architecture, family_part(architecture.family, "data").MEDIA_KINDS)
    return source


@contextmanager
def open_checkpoint(
    source: CheckpointSource, *, engine: Literal["auto", "transformers", "megatron"],
    dtype: Literal["auto", "fp32", "bf16", "fp16"], min_pixels: int | None = None, max_pixels: int | None = None,
) -> Iterator[Opened]:  # fmt: skip
    """Open a checkpoint for a block.

    Args:
        source: From :func:`locate`.
        engine: `auto` is transformers; a Megatron checkpoint is exported to a folder that is removed afterwards.
        dtype: `auto` is fp32 on a CPU and bf16 elsewhere.
        min_pixels: Fewest pixels of an image; None leaves it to the processor.
        max_pixels: Most pixels of an image; None leaves it to the processor.

    Raises:
        ConfigError, WeightMappingError: it cannot be opened; the message says why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number_format = DTYPES[("fp32" if device.type == "cpu" else "bf16") if dtype == "auto" else dtype]
    processor = load_processor(
        source.hf_folder,
        load_architecture(source.hf_folder).vision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    engine_name: EngineName = "transformers" if engine == "auto" else engine
    if engine_name == "megatron":
        opening = _native(source, device, number_format, processor)
    else:
        opening = _transformers(source, device, number_format, processor)
    with opening as loaded:
        yield Opened(engine=loaded, engine_name=engine_name, source=source, fingerprint=fingerprint(source))


@contextmanager
def _transformers(
    source: CheckpointSource, device: torch.device, dtype: torch.dtype, processor: Any
) -> Iterator[Any]:
    with hf_weights(source) as folder:
        yield transformers_engine.load_transformers_engine(folder, processor, device=device, dtype=dtype)


@contextmanager
def hf_weights(source: CheckpointSource) -> Iterator[Path]:
    """The checkpoint as a HF folder, for as long as the block lasts; a Megatron one is exported."""
    from models.conversion.convert import Options, megatron_to_hf

    if source.megatron_folder is None:
        yield source.hf_folder
        return
    with tempfile.TemporaryDirectory(prefix="qwen-harness-generate-") as root:
        folder = Path(root) / "hf"
        logger.info("exporting %s to a temporary Hugging Face folder", source.megatron_folder)
        megatron_to_hf(source.megatron_folder, folder, source.hf_folder, Options())
        yield folder


@contextmanager
def _native(
    source: CheckpointSource, device: torch.device, dtype: torch.dtype, processor: Any
) -> Iterator[Any]:
    from models.training.cpu import cpu_megatron

    architecture = load_architecture(source.hf_folder)
    settings = ModelSettings(
        dtype=dtype,
        device=device.type,
        attention_backend=resolve_attention_backend("auto", device.type),
    )
    with cpu_megatron() if device.type == "cpu" else nullcontext(), _single_process(device):
        model = (
            family_part(architecture.family, "model").build_model(architecture, settings).to(device).eval()
        )
        _fill(model, source)
        yield megatron_engine.MegatronEngine(
            architecture=architecture,
            model=model,
            processor=processor,
            device=device,
            end_tokens=end_tokens(source.hf_folder, processor),
        )


@contextmanager
def _single_process(device: torch.device) -> Iterator[None]:
    """Megatron's process groups of one process, unless they are up already; several are refused.

    Raises:
        ConfigError: a launcher started several processes.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch import distributed

    from models.contract.launcher import read_launcher_environment
    from models.training.parallel import stop_distributed

    is_up = parallel_state.model_parallel_is_initialized()
    world_size = distributed.get_world_size() if is_up else read_launcher_environment().world_size
    if world_size != 1:
        raise ConfigError(
            "generation runs in one process",
            where="WORLD_SIZE",
            expected="1",
            got=str(world_size),
            fix="start it without a launcher",
        )
    if is_up:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=device.type != "cpu")
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        stop_distributed()


def _fill(model: Any, source: CheckpointSource) -> None:
    if source.megatron_folder is None:
        from models.conversion.load import load_hf_weights

        load_hf_weights(model, source.hf_folder)
        return
    from megatron.core import dist_checkpointing

    from models.conversion.torch_dist import model_state

    state = model_state([model])
    loaded: Any = dist_checkpointing.load(state, str(source.megatron_folder), strict="raise_all")
    model.load_state_dict(loaded["model"], strict=False)
