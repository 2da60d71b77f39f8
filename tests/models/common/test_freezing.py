# SPDX-License-Identifier: Apache-2.0
"""Which parameters one optimizer step changes, for each group frozen alone and together, tower by tower."""

from typing import Any

import pytest
import torch

from models.common.settings import ModelSettings
from models.parity.oracles import TINY
from models.parity.single import make_pair

pytestmark = pytest.mark.usefixtures("single_process")

GROUPS = ("language", "vision", "projector", "audio")


def group_of(name: str) -> str:
    """By hand: mergers of the vision tower are the projector; the audio tower keeps its own projections."""
    if name.startswith("language_model."):
        return "language"
    if name.startswith("audio_model."):
        return "audio"
    return "projector" if "merger" in name else "vision"


def changed_by_a_step(model: str, case: str, frozen: tuple[str, ...]) -> tuple[set[str], dict[str, Any]]:
    """Names of the parameters that one AdamW step changed, and all parameters."""
    pair = make_pair(model, ModelSettings(freeze=frozen, moe_aux_loss_coeff=0.0))  # type: ignore[arg-type]
    made, _ = pair.case(case)
    named = dict(pair.model.named_parameters())
    before = {name: value.detach().clone() for name, value in named.items()}
    optimizer = torch.optim.AdamW(
        [p for p in named.values() if p.requires_grad], lr=0.01, eps=1e-12, weight_decay=0
    )
    (pair.model(made.batch).sum() / made.batch.num_supervised_tokens).backward()
    optimizer.step()
    return {name for name, value in named.items() if not torch.equal(value, before[name])}, named


def check(model: str, frozen: tuple[str, ...]) -> None:
    groups = {"language", "vision", "projector"} | ({"audio"} if model == "qwen3_omni" else set())
    case = "audio and vision" if model == "qwen3_omni" else "mixed"
    changed, named = changed_by_a_step(model, case, frozen)
    wanted = {name for name in named if group_of(name) in groups - set(frozen)}
    idle = {name for name in wanted if ".experts." in name}  # one that no token was sent to keeps its values
    assert changed <= wanted
    assert wanted - idle <= changed
    assert {group_of(name) for name in changed} == groups - set(frozen)


MATRIX = [
    (model, frozen)
    for model in TINY
    for frozen in [(), *((group,) for group in GROUPS), ("language", "vision"), ("vision", "projector")]
    if model == "qwen3_omni" or "audio" not in frozen
]


@pytest.mark.parametrize("frozen", [(group,) for group in GROUPS])
def test_step_changes_all_groups_but_the_frozen_one(frozen: tuple[str, ...]) -> None:
    check("qwen3_omni", frozen)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "frozen"), MATRIX)
def test_freezing_matrix(model: str, frozen: tuple[str, ...]) -> None:
    check(model, frozen)


def test_everything_frozen_leaves_nothing_to_train() -> None:
    pair = make_pair("qwen3_omni", ModelSettings(freeze=GROUPS))  # type: ignore[arg-type]
    assert not [name for name, value in pair.model.named_parameters() if value.requires_grad]
