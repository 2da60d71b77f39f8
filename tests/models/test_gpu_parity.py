# SPDX-License-Identifier: Apache-2.0
"""Every family on a GPU, with torch's and TransformerEngine's kernels, against transformers on the CPU in fp32."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from models.common.settings import DTYPES, ModelSettings
from models.parity.cases import AUDIO_CASES, CASES, pack
from models.parity.compare import relative_error
from models.parity.oracles import TINY
from models.parity.single import LIMITS, make_pair, measure_rounding

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_gpu")]

BACKENDS = ["torch", *(["te"] if find_spec("transformer_engine") else [])]


def settings(backend: str, dtype: str, **changes: Any) -> ModelSettings:
    return ModelSettings(
        device="cuda",
        attention_backend=backend,  # type: ignore[arg-type]
        dtype=DTYPES[dtype],
        moe_aux_loss_coeff=0.0,
        **changes,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_gpu_model_equals_transformers(name: str, backend: str, dtype: str) -> None:
    pair = make_pair(name, settings(backend, dtype))
    pair.model.cuda()
    cases = [*CASES, *(AUDIO_CASES if pair.architecture.audio is not None else ())]
    kind = product_format(backend, dtype, has_experts=pair.architecture.text.moe is not None)
    wrong = []
    for case in cases:
        made, reference = pair.case(case)
        found = measure_rounding(pair, made, reference, gradient_floor=LIMITS[kind].gradient_floor)
        assert found.dictated.num_gradients == len(pair.rules)
        exceeding = found.exceeding(LIMITS[kind])
        print(f"{name}, {backend}, {dtype} as {kind}, {case}: {found} {'DIFFERS' if exceeding else 'agrees'}")  # noqa: T201
        wrong += [f"{case}: {what}" for what in exceeding]
    assert not wrong


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", TINY)
def test_gpu_model_that_recomputes_equals_transformers(name: str, recompute: str) -> None:
    """In 16 bits, where the attention is the fused one; through every kind of layer that the model has."""
    changes = {"recompute": recompute, "recompute_vision": recompute == "full"}
    pair = make_pair(name, settings(BACKENDS[-1], "bf16", **changes))
    pair.model.cuda()
    made, reference = pair.case("mixed")
    found = measure_rounding(pair, made, reference, gradient_floor=LIMITS["bf16"].gradient_floor)
    assert found.dictated.num_gradients == len(pair.rules)
    assert not found.exceeding(LIMITS["bf16"]), str(found)


@pytest.mark.skipif("te" not in BACKENDS, reason="grouped experts stand in TransformerEngine's layers")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", [name for name in TINY if "num_experts" in TINY[name].config["text_config"]])
def test_gpu_model_with_grouped_experts_equals_transformers(
    name: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("went expert by expert")

    monkeypatch.setattr(TEGroupedMLP, "forward", refuse)
    pair = make_pair(name, settings("te", "bf16", experts_backend="grouped", recompute=recompute))
    pair.model.cuda()
    cases = [*CASES, *(AUDIO_CASES if pair.architecture.audio is not None else ())]
    wrong = []
    for case in cases if recompute == "none" else ("mixed",):
        made, reference = pair.case(case)
        found = measure_rounding(pair, made, reference, gradient_floor=LIMITS["bf16"].gradient_floor)
        assert found.dictated.num_gradients == len(pair.rules)
        exceeding = found.exceeding(LIMITS["bf16"])
        print(f"{name}, grouped experts, {recompute}, {case}: {found} {'DIFFERS' if exceeding else 'agrees'}")  # noqa: T201
        wrong += [f"{case}: {what}" for what in exceeding]
    assert not wrong


def product_format(backend: str, dtype: str, *, has_experts: bool) -> str:
    """TransformerEngine multiplies fp32 as TF32, and so does megatron-core's router wherever it is installed."""
    is_tf32 = backend == "te" or (has_experts and len(BACKENDS) > 1)
    return "tf32" if dtype == "fp32" and is_tf32 else dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_gpu_packed_row_equals_padded_rows(name: str, backend: str) -> None:
    pair = make_pair(name, settings(backend, "bf16"))
    pair.model.cuda()
    made, reference = pair.case("mixed")
    with torch.no_grad():
        losses = pair.model(pack(made.batch).to("cuda")).cpu()
    difference = relative_error(losses.sum(), reference.token_losses.sum())
    print(f"{name}, {backend}, bf16, packed: loss {difference:.1e}")  # noqa: T201 - the record
    assert difference < LIMITS["bf16"].loss
