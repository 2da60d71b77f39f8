# SPDX-License-Identifier: Apache-2.0
"""One model on one process, both sides ready to compare."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from models.common.multimodal import MultimodalModel
from models.common.settings import ModelSettings
from models.common.weight_rules import WeightRule
from models.contract.architecture import Architecture
from models.contract.families import family_part
from models.parity.cases import Case, make_case
from models.parity.compare import Reference, load, run_oracle, to_megatron
from models.parity.oracles import TINY, architecture_of, build_oracle, named_tensors, rules_of


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
