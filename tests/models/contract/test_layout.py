# SPDX-License-Identifier: Apache-2.0
"""Every rule of a layout refuses what breaks it, by name, and lets the published layouts through."""

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest

from models.contract.errors import ConfigError
from models.contract.families import published_architecture
from models.contract.layout import (
    check_layout,
    expert_ranks,
    has_equal_shares,
    require_layout,
    sequence_multiple,
)
from models.contract.recipe import Recipe, parse_recipe


def recipe(**sections: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "case",
        "num_processes": 8,
        "model": {"family": "qwen3_vl", "checkpoint": "x"},
        "data": {"dataset": "x", "seq_length": 4096},
        "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 64},
        "optimizer": {"lr": 1e-5},
    }
    for name, section in sections.items():
        data[name] = (data.get(name, {}) | section) if isinstance(section, dict) else section
    return parse_recipe(data, where="test")


def rules(size: str, **sections: Any) -> list[str]:
    return [
        f"{problem.where}: {problem.rule}"
        for problem in check_layout(published_architecture(size), recipe(**sections))
    ]


TP8 = {"tensor_model_parallel_size": 8}
PP2 = {"pipeline_model_parallel_size": 2}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
GATHER = {"moe_token_dispatcher_type": "allgather"}


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        ("qwen2_5_vl_7b", {}),
        ("qwen2_5_vl_7b", {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
        ("qwen3_vl_8b", TP8 | {"sequence_parallel": True}),
        ("qwen3_vl_8b", PP2 | {"num_layers_in_first_pipeline_stage": 14}),
        ("qwen3_vl_8b", {"context_parallel_size": 8}),
        ("qwen3_vl_30b_a3b", {"expert_model_parallel_size": 8}),
        ("qwen3_vl_30b_a3b", GATHER | {"expert_model_parallel_size": 4}),
        ("qwen3_vl_235b_a22b", {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}),
        ("qwen3_omni_30b_a3b", {"tensor_model_parallel_size": 4, "sequence_parallel": True,
                                "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    ],
)  # fmt: skip
def test_layouts_that_divide_pass(size: str, parallel: dict[str, Any]) -> None:
    assert rules(size, parallel=parallel) == []


@pytest.mark.parametrize(
    ("size", "sections", "rule"),
    [
        ("qwen2_5_vl_7b", {"parallel": TP8}, "num_attention_heads must be a multiple"),
        ("qwen2_5_vl_3b", {"parallel": {"tensor_model_parallel_size": 4}}, "num_query_groups must be a multiple"),
        ("qwen2_5_vl_3b", {"parallel": TP8}, "vision tower's ffn_hidden_size must be a multiple"),
        ("qwen3_vl_8b", {"parallel": {"sequence_parallel": True}}, "needs at least two"),
        ("qwen3_vl_30b_a3b", {"parallel": {"tensor_model_parallel_size": 2}}, "needs sequence_parallel"),
        ("qwen3_vl_8b", {"parallel": {"pipeline_model_parallel_size": 8}}, "must divide over the other stages"),
        ("qwen3_vl_8b", {"parallel": {"num_layers_in_first_pipeline_stage": 3}}, "needs a pipeline"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"num_layers_in_first_pipeline_stage": 36}}, "must divide over"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"num_layers_in_first_pipeline_stage": 0}}, "at least one layer"),
        ("qwen3_vl_8b", {"parallel": {"virtual_pipeline_model_parallel_size": 2}}, "virtual stages need a pipeline"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 4}}, "layers of a stage must be"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 9}}, "deepstack levels"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2},
                         "data": {"packing": True}}, "rows of one length"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2},
                         "train": {"global_batch_size": 4}}, "number of micro-batches"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2},
                         "train": {"eval_interval": 1, "eval_samples": 12}}, "number of micro-batches"),
        ("qwen3_vl_8b", {"parallel": {"context_parallel_size": 8}, "data": {"seq_length": 4100}}, "seq_length must be"),
        ("qwen3_vl_8b", {"parallel": {"expert_model_parallel_size": 2}}, "needs a mixture of experts"),
        ("qwen3_vl_30b_a3b", {"num_processes": 6, "parallel": {"expert_model_parallel_size": 6},
                              "train": {"global_batch_size": 6}}, "number of experts must be a multiple"),
        ("qwen3_vl_30b_a3b", {"num_processes": 4, "parallel": {"expert_model_parallel_size": 8}}, "etp * ep * pp"),
        ("qwen3_vl_8b", {"precision": {"fp8": "tensorwise"}, "data": {"seq_length": 4088}}, "padded tokens of a rank"),
        ("qwen3_vl_8b", {"precision": {"fp8": "tensorwise"}, "model": {"attention_backend": "torch"}},
         "no fp8 products"),
        ("qwen3_vl_8b", {"model": {"num_layers": 2}}, "num_layers must hold the deepstack levels"),
        ("qwen3_vl_8b", {"model": {"freeze": ["audio"]}}, "only a model with an audio tower"),
        ("qwen3_vl_8b", {"model": {"freeze": ["language", "vision", "projector"]}}, "must be left to train"),
        ("qwen3_omni_30b_a3b", {"model": {"freeze": ["language", "vision", "projector", "audio"]}},
         "must be left to train"),
        ("qwen3_vl_8b", {"train": {"engine": "fsdp2"}, "parallel": TP8}, "fsdp2 engine"),
        ("qwen3_vl_8b", {"parallel": PP2 | {"num_layers_in_last_pipeline_stage": 35,
                                            "num_layers_in_first_pipeline_stage": 2}}, "must divide over"),
        ("qwen3_vl_8b", {"data": {"packing": True}, "train": {"micro_batch_size": 2}}, "a pack is a micro-batch"),
        ("qwen3_vl_8b", {"data": {"vision_tokens_per_pack": 100}}, "a vision-token budget is one of packs"),
        ("qwen3_vl_8b", {"data": {"min_pixels": 9, "max_pixels": 4}}, "min_pixels must not be above max_pixels"),
        ("qwen3_vl_8b", {"train": {"eval_interval": 5}}, "an evaluation needs samples"),
        ("qwen3_vl_8b", {"train": {"eval_interval": 5, "eval_samples": 12}}, "eval_samples must be a multiple"),
        ("qwen3_vl_8b", {"train": {"eval_samples": 64}}, "held-out samples are for evaluations"),
        ("qwen3_vl_8b", {"data": {"eval_dataset": "y"}}, "held-out samples are for evaluations"),
        ("qwen3_vl_8b", {"precision": {"recompute": "selective", "recompute_num_layers": 2}}, "full recompute only"),
        ("qwen3_vl_8b", {"optimizer": {"min_lr": 1e-3}}, "min_lr must not be above lr"),
        ("qwen3_vl_8b", {"model": {"freeze": ["vision"]}, "optimizer": {"vision_lr_mult": 0.1}}, "frozen group has no"),
        ("qwen3_vl_8b", {"model": {"freeze": ["projector"]}, "optimizer": {"projector_lr_mult": 2.0}},
         "frozen group has no"),
        ("qwen3_vl_8b", {"optimizer": {"lr_warmup_iters": 1}}, "warm-up must end before"),
        ("qwen3_vl_8b", {"optimizer": {"use_precision_aware_optimizer": True, "use_distributed_optimizer": False}},
         "needs use_distributed_optimizer"),
        ("qwen3_vl_8b", {"optimizer": {"cpu_offload_fraction": 0.5, "use_distributed_optimizer": False}},
         "cpu_offload_fraction needs use_distributed_optimizer"),
        ("qwen3_vl_8b", {"optimizer": {"cpu_offload_fraction": 0.5}, "precision": {"dtype": "fp32"}},
         "cpu_offload_fraction moves the fp32 copies of 16-bit weights"),
        ("qwen3_vl_8b", {"parallel": {"overlap_param_gather": True}}, "overlap_param_gather needs"),
        ("qwen3_vl_30b_a3b", {"train": {"engine": "fsdp2"}, "parallel": {"expert_model_parallel_size": 2}},
         "fsdp2 engine splits"),
        ("qwen3_vl_8b", {"train": {"engine": "fsdp2"}, "precision": {"dtype": "fp16"}}, "fsdp2 engine does not"),
        ("qwen3_vl_8b", {"train": {"engine": "fsdp2"}, "precision": {"fp8": "tensorwise"}}, "fsdp2 engine does not"),
        ("qwen3_vl_8b", {"train": {"engine": "fsdp2"}, "precision": {"recompute": "selective"}}, "fsdp2 engine does"),
        ("qwen3_vl_8b", {"train": {"engine": "fsdp2"}, "precision": {"recompute": "full", "recompute_num_layers": 2}},
         "fsdp2 engine does not"),
        ("qwen3_vl_8b", {"train": {"engine": "fsdp2"}, "optimizer": {"cpu_offload_fraction": 0.5}}, "fsdp2 engine"),
        ("qwen3_vl_8b", {"model": {"experts_backend": "grouped"}}, "only a mixture of experts has experts"),
        ("qwen3_vl_8b", {"parallel": GATHER}, "only a mixture of experts sends tokens"),
        ("qwen3_vl_30b_a3b", {"parallel": GATHER | {"expert_model_parallel_size": 4}, "data": {"padding": "longest"}},
         "must have rows of one length"),
        ("qwen3_vl_30b_a3b", {"parallel": GATHER | {"expert_tensor_parallel_size": 2}, "data": {"padding": "longest"}},
         "must have rows of one length"),
        ("qwen3_vl_30b_a3b", {"train": {"engine": "fsdp2"}, "parallel": GATHER}, "fsdp2 engine does not"),
    ],
)  # fmt: skip
def test_broken_rule_is_named(size: str, sections: dict[str, Any], rule: str) -> None:
    found = rules(size, **sections)
    assert any(rule in line for line in found), found


@pytest.mark.parametrize(
    ("parallel", "is_equal"),
    [
        ({}, True),
        ({"expert_model_parallel_size": 2}, False),
        ({"expert_tensor_parallel_size": 2}, False),
        (SP2, True),
        (SP2 | {"expert_tensor_parallel_size": 1}, True),
        (SP2 | {"expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2}, True),
        (SP2 | {"expert_model_parallel_size": 2}, False),
        (SP2 | {"expert_model_parallel_size": 2, "context_parallel_size": 2}, True),
        ({"expert_model_parallel_size": 2, "context_parallel_size": 4}, True),
        ({"expert_model_parallel_size": 8, "context_parallel_size": 4}, False),
        ({"expert_model_parallel_size": 8, "context_parallel_size": 8}, True),
        (PP2 | {"expert_model_parallel_size": 4, "context_parallel_size": 4}, True),
    ],
)
def test_ranks_that_share_experts_have_rows_of_one_length_where_they_have_the_same_rows(
    parallel: dict[str, Any], is_equal: bool
) -> None:
    longest, fixed = (recipe(parallel=parallel, data={"padding": name}) for name in ("longest", "max_length"))
    assert has_equal_shares(longest) is is_equal
    assert has_equal_shares(fixed)
    found = rules("qwen3_vl_30b_a3b", parallel=parallel | GATHER, data={"padding": "longest"})
    assert [line for line in found if "rows of one length" not in line] == []
    assert bool(found) is not is_equal
    for other in ("auto", "alltoall"):  # either runs everywhere
        layout = parallel | {"moe_token_dispatcher_type": other}
        assert rules("qwen3_vl_30b_a3b", parallel=layout, data={"padding": "longest"}) == []


def test_ranks_of_one_expert_group_have_parts_of_the_same_rows() -> None:
    """What :func:`has_equal_shares` counts on, as megatron-core lays ranks out."""
    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    for tp, cp, pp, etp, ep in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4)):
        num_ranks = 32
        dense = RankGenerator(
            tp=tp, ep=1, dp=num_ranks // (tp * cp * pp), pp=pp, cp=cp, order=order, rank_offset=0
        )
        experts = RankGenerator(
            tp=etp, ep=ep, dp=num_ranks // (etp * ep * pp), pp=pp, cp=1, order=order, rank_offset=0
        )
        same_rows = [set(ranks) for ranks in dense.get_ranks("tp-cp")]
        shares = [set(ranks) for ranks in experts.get_ranks("tp-ep")]
        sizes = {
            "tensor_model_parallel_size": tp, "context_parallel_size": cp, "pipeline_model_parallel_size": pp,
            "expert_tensor_parallel_size": etp, "expert_model_parallel_size": ep,
        }  # fmt: skip
        made = recipe(num_processes=num_ranks, parallel=sizes, data={"padding": "longest"})
        assert {len(ranks) for ranks in shares} == {expert_ranks(made)}
        assert has_equal_shares(made) is all(any(ranks <= rows for rows in same_rows) for ranks in shares), (
            sizes
        )


GROUPED = {"model": {"experts_backend": "grouped"}}


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"model": {"experts_backend": "grouped", "attention_backend": "torch"}}, "model.attention_backend"),
        ({"precision": {"fp8": "blockwise"}}, "precision.fp8"),
        ({"precision": {"dtype": "fp16"}}, "precision.dtype"),
        ({"train": {"engine": "fsdp2"}}, "train.engine"),
        ({"parallel": {"expert_tensor_parallel_size": 2}}, "parallel.expert_tensor_parallel_size"),
        # where it is not said, it is that of the other layers
        ({"parallel": {"tensor_model_parallel_size": 4, "sequence_parallel": True}},
         "parallel.expert_tensor_parallel_size"),
    ],
)  # fmt: skip
def test_experts_in_one_launch_are_refused_where_there_is_no_kernel(
    sections: dict[str, Any], where: str
) -> None:
    architecture = published_architecture("qwen3_vl_30b_a3b")
    [problem] = check_layout(architecture, recipe(**GROUPED | sections))
    assert problem.where == where
    assert problem.rule.startswith("experts in one launch")
    assert "experts_backend = 'te'" in problem.fix
    split = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "expert_tensor_parallel_size": 1}
    assert check_layout(architecture, recipe(**GROUPED, parallel=split)) == []
    [problem] = check_layout(architecture, recipe(**GROUPED), hardware="cpu")
    assert (problem.where, problem.rule) == ("model.experts_backend", "this needs a GPU")


@pytest.mark.parametrize(
    "sections",
    [
        {"precision": {"fp8": "tensorwise"}},
        {"model": {"attention_backend": "te"}},
        {"optimizer": {"use_precision_aware_optimizer": True}},
        {"optimizer": {"cpu_offload_fraction": 0.5}},
    ],
)
def test_what_a_cpu_cannot_do_is_refused_there_and_not_elsewhere(sections: dict[str, Any]) -> None:
    architecture, made = published_architecture("qwen3_vl_8b"), recipe(**sections)
    [problem] = check_layout(architecture, made, hardware="cpu")
    [(section, [(name, _)])] = [(key, list(value.items())) for key, value in sections.items()]
    assert (problem.where, problem.rule) == (f"{section}.{name}", "this needs a GPU")
    assert problem.fix
    assert check_layout(architecture, made, hardware="h20") == check_layout(architecture, made) == []


def test_every_refusal_names_key_and_fix() -> None:
    """One recipe that breaks as much as it can: each line says which key, what it holds, and what to do."""
    broken = recipe(
        num_processes=24,
        parallel={"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 2, "context_parallel_size": 4,
                  "virtual_pipeline_model_parallel_size": 5, "expert_model_parallel_size": 7,
                  "expert_tensor_parallel_size": 5, "overlap_param_gather": True},
        data={"seq_length": 4099, "packing": True}, precision={"fp8": "delayed"},
        train={"micro_batch_size": 3, "global_batch_size": 3}, optimizer={"min_lr": 1.0},
        model={"num_layers": 2, "freeze": ["audio"]},
    )  # fmt: skip
    problems = check_layout(published_architecture("qwen3_vl_30b_a3b"), broken, hardware="cpu")
    assert len(problems) >= 15
    for problem in problems:
        section, _, key = problem.where.partition(".")
        assert key in type(getattr(broken, section)).model_fields, problem
        assert problem.fix
        assert problem.got


def test_all_problems_come_at_once() -> None:
    found = rules(
        "qwen2_5_vl_7b", parallel=TP8 | {"expert_model_parallel_size": 2}, data={"seq_length": 4097}
    )
    assert len(found) >= 3


def test_problem_reads_as_one_line() -> None:
    [problem] = check_layout(
        published_architecture("qwen3_vl_8b"),
        recipe(data={"seq_length": 4100}, parallel={"context_parallel_size": 8}),
    )
    assert str(problem) == (
        "data.seq_length: seq_length must be a multiple of what sequence and context parallelism cut it into "
        "(got 4100, pieces 16; use 4112)"
    )


@pytest.mark.parametrize(
    ("parallel", "multiple"),
    [({}, 1), ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4), ({"context_parallel_size": 2}, 4),
     ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 4}, 8)],
)  # fmt: skip
def test_sequence_multiple(parallel: dict[str, Any], multiple: int) -> None:
    assert sequence_multiple(recipe(parallel=parallel)) == multiple


def test_require_layout_raises_one_error_with_every_rule() -> None:
    broken = recipe(
        parallel={"context_parallel_size": 8, "expert_model_parallel_size": 2}, data={"seq_length": 4100}
    )
    with pytest.raises(ConfigError, match=r"2 rule\(s\) broken") as error:
        require_layout(published_architecture("qwen3_vl_8b"), broken)
    assert "data.seq_length" in str(error.value)
    assert "needs a mixture of experts" in str(error.value)


def test_routing_to_a_single_expert_is_refused() -> None:
    architecture = published_architecture("qwen3_vl_30b_a3b")
    text = architecture.text
    assert text.moe is not None
    single = replace(architecture, text=replace(text, moe=replace(text.moe, topk=1)))
    [problem] = check_layout(single, recipe(parallel={"expert_model_parallel_size": 8}))
    assert str(problem).startswith("model.checkpoint: megatron-core does not route to a single expert")
    assert "num_experts_per_tok = 1" in str(problem)
