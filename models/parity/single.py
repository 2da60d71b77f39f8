# SPDX-License-Identifier: Apache-2.0
"""One model on one process, both sides ready to compare."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from models.common.multimodal import MultimodalModel
from models.common.settings import ModelSettings
from models.common.weight_rules import WeightRule
from models.contract.architecture import Architecture
from models.contract.families import family_part
from models.parity.cases import Case, make_case
from models.parity.compare import (
    Comparison,
    Reference,
    compare,
    load,
    real_positions,
    relative_error,
    run_oracle,
    to_megatron,
)
from models.parity.oracles import TINY, architecture_of, build_oracle, named_tensors, rules_of
from models.parity.routing import dictated, num_elsewhere, recorded


class Limits(NamedTuple):
    """Largest differences from transformers in fp32 that rounding explains, and what gradients are measured against."""

    logits: float
    loss: float
    gradient: float
    gradient_floor: float = 5e-5


LIMITS = {
    "fp32": Limits(1e-5, 1e-5, 1e-4),
    "tf32": Limits(1e-2, 2e-3, 2e-2),
    "bf16": Limits(5e-2, 2e-2, 0.15, gradient_floor=1e-2),
}
"""By the format that matrix products take. Worst over all families and cases with the experts dictated: fp32 2.0e-6,
4.7e-7, 5.5e-6 (CPU and H200); TF32 on the CPU 2.4e-3, 9.2e-4, 7.2e-3, and with operands cut instead of rounded, which
hardware may do, 8.9e-3, 1.7e-3, 1.6e-2; bf16 on the CPU 4.0e-2, 1.3e-2, 0.10, and transformers' own bf16 4.3e-2,
1.4e-2, 0.11."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A transformers model and ours with the same weights."""

    name: str
    oracle: PreTrainedModel
    architecture: Architecture
    rules: tuple[WeightRule, ...]
    model: MultimodalModel

    def case(self, name: str, *, multiple: int = 1, seed: int = 0) -> tuple[Case, Reference]:
        """A micro-batch and what transformers makes of it."""
        splits = TINY[self.name].splits_videos
        case = make_case(name, self.oracle, splits_videos=splits, multiple=multiple, seed=seed)
        return case, run_oracle(self.name, self.oracle, case, self.rules)


def make_pair(name: str, settings: ModelSettings | None = None, *, seed: int = 0) -> Pair:
    """Build both sides. megatron-core's groups of one process must be up.

    Args:
        name: A key of :data:`models.parity.oracles.TINY`.
        settings: How ours runs; by default fp32 with torch kernels and no auxiliary loss.
        seed: Of the weights.
    """
    settings = settings or ModelSettings(moe_aux_loss_coeff=0.0)
    oracle = build_oracle(name, seed=seed)
    architecture = architecture_of(name, oracle)
    rules = rules_of(name, architecture)
    model = family_part(architecture.family, "model").build_model(architecture, settings)
    with torch.no_grad():
        load(model, to_megatron(named_tensors(name, dict(oracle.named_parameters())), rules))
    return Pair(name=name, oracle=oracle, architecture=architecture, rules=rules, model=model)


class Rounding(NamedTuple):
    """How far our model is from transformers in fp32, with transformers' experts and with its own."""

    dictated: Comparison
    """Every token goes where transformers sends it: what is left is rounding."""
    free_logits: float
    """Logits where our model chooses."""
    num_elsewhere: int
    """Tokens that it sends to other experts, in any layer."""
    num_tokens: int

    def exceeding(self, limits: Limits) -> list[str]:
        """What is out of bounds; free routing must be within them too when it sends every token where it should."""
        found = {name: getattr(self.dictated, name) for name in ("logits", "loss", "gradient")}
        wrong = [
            f"{name} {value:.1e} > {getattr(limits, name):.0e}"
            for name, value in found.items()
            if not value <= getattr(limits, name)
        ]
        if self.num_elsewhere == 0 and not self.free_logits <= limits.logits:
            wrong.append(
                f"logits {self.free_logits:.1e} > {limits.logits:.0e} with its own, the same, experts"
            )
        return wrong

    def __str__(self) -> str:
        result = self.dictated
        return (
            f"logits {result.logits:.1e}, loss {result.loss:.1e}, gradient {result.gradient:.1e} ({result.worst}); "
            f"own routing: {self.num_elsewhere} of {self.num_tokens} tokens elsewhere, logits {self.free_logits:.1e}"
        )


def measure_rounding(pair: Pair, case: Case, reference: Reference, *, gradient_floor: float) -> Rounding:
    """Compare a model that rounds more than the reference with it; for dense models both routings are one.

    Args:
        pair: Both sides; ours may be on a GPU and in half precision.
        case: From :meth:`Pair.case`.
        reference: The same.
        gradient_floor: See :func:`models.parity.compare.gradient_errors`.
    """
    batch, num_rows = case.batch, case.batch.input_ids.shape[0]
    on_device = dataclasses.replace(batch.to(next(pair.model.parameters()).device), labels=None)
    with torch.no_grad(), recorded(pair.model, num_rows) as own:
        logits = pair.model(on_device).to("cpu", torch.float32)
    is_real = real_positions(batch)
    elsewhere, tokens = num_elsewhere(own, reference.routing, is_real)
    with dictated(pair.model, reference.routing, num_rows):
        result = compare(pair.model, batch, reference, gradient_floor=gradient_floor)
    return Rounding(result, relative_error(logits, reference.logits, is_real), elsewhere, tokens)
