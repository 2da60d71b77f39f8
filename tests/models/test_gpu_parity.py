# SPDX-License-Identifier: Apache-2.0
"""Every family on a GPU, with torch's and TransformerEngine's kernels, against transformers on the CPU in fp32."""

from importlib.util import find_spec

import pytest
import torch

from models.common.settings import DTYPES, ModelSettings
from models.parity.cases import AUDIO_CASES, CASES, pack
from models.parity.compare import compare, relative_error
from models.parity.oracles import TINY
from models.parity.single import make_pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_gpu")]

# Logits, loss, gradient; worst measured on one H200 beside each. TransformerEngine multiplies fp32 as TF32, and
# megatron-core's router does so too where it is installed. A score rounded to TF32 or bf16 can send a token to another
# expert, so that single logits and expert gradients of MoE models have no bound worth stating: the loss has.
TOLERANCE = {
    "fp32": (1e-4, 1e-4, 1e-3),  # torch, dense: 1.6e-6, 4.7e-7, 5.5e-6
    "tf32": (1e-2, 2e-3, 2e-2),
    "tf32 moe": (0.5, 2e-3, 2e-2),
    "bf16": (5e-2, 2e-2, 0.15),
    "bf16 moe": (0.5, 5e-2, float("inf")),
}
BACKENDS = ["torch", *(["te"] if find_spec("transformer_engine") else [])]


@pytest.fixture
def single_gpu():
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


def settings(backend: str, dtype: str) -> ModelSettings:
    return ModelSettings(
        device="cuda", attention_backend=backend, dtype=DTYPES[dtype], moe_aux_loss_coeff=0.0  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_gpu_model_equals_transformers(name: str, backend: str, dtype: str) -> None:
    pair = make_pair(name, settings(backend, dtype))
    pair.model.cuda()
    cases = [*CASES, *(AUDIO_CASES if pair.architecture.audio is not None else ())]
    is_moe = pair.architecture.text.moe is not None
    has_te = len(BACKENDS) > 1
    if dtype == "fp32":
        is_tf32 = backend == "te" or (is_moe and has_te)
        limits = TOLERANCE[("tf32 moe" if is_moe else "tf32") if is_tf32 else "fp32"]
    else:
        limits = TOLERANCE["bf16 moe" if is_moe else "bf16"]
    found = {}
    for case in cases:
        made, reference = pair.case(case)
        floor = 5e-5 if dtype == "fp32" else 1e-2
        result = compare(pair.model, made.batch, reference, gradient_floor=floor)
        assert result.num_gradients == len(pair.rules)
        found[case] = (result.logits, result.loss, result.gradient, result.worst)
    print(name, backend, dtype, {case: [f"{value:.1e}" for value in row[:3]] for case, row in found.items()})  # noqa: T201
    for case, row in found.items():
        assert all(value < limit for value, limit in zip(row, limits, strict=False)), (case, row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_gpu_packed_row_equals_padded_rows(name: str, backend: str) -> None:
    pair = make_pair(name, settings(backend, "bf16"))
    pair.model.cuda()
    made, reference = pair.case("mixed")
    with torch.no_grad():
        losses = pair.model(pack(made.batch).to("cuda")).cpu()
    assert relative_error(losses.sum(), reference.token_losses.sum()) < TOLERANCE["bf16 moe"][1]
