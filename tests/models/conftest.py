# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[2] / "models" / "contract" / "published"


@pytest.fixture
def hf_shapes():
    """Shapes of transformers' model for a config, by its in-memory names; nothing is allocated."""
    import torch
    import transformers

    def shapes(config: dict) -> dict[str, tuple[int, ...]]:
        config = json.loads(json.dumps(config))
        parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
        with torch.device("meta"):
            model = getattr(transformers, config["architectures"][0])(parsed)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    return shapes


@pytest.fixture
def published(tmp_path):
    """A folder with a published config.json."""

    def folder(name: str) -> Path:
        shutil.copyfile(PUBLISHED / f"{name}.json", tmp_path / "config.json")
        return tmp_path

    return folder


@pytest.fixture
def single_process():
    """One gloo process with megatron-core's groups, on the CPU; taken down after the test."""
    import torch
    from megatron.core import parallel_state
    from torch import distributed

    from models.training.cpu import cpu_megatron

    torch.set_num_threads(1)
    with cpu_megatron():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


@pytest.fixture
def single_gpu():
    """One NCCL process with megatron-core's groups, on the first GPU, without TF32; taken down after the test."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from torch import distributed

    if not torch.cuda.is_available():
        pytest.fail("the tests marked gpu need a CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(0)
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()
