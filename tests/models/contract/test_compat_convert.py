# SPDX-License-Identifier: Apache-2.0
import pytest

from models.contract.compat_convert import mm_convert, run_8xh20
from models.contract.errors import ConfigError


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_run_8xh20_maps_both_directions_and_keeps_the_precision(dtype) -> None:
    there = ["A3B", "/hf", "/mcore", "false", "true", dtype]
    assert run_8xh20(there) == ["hf-to-megatron", "/hf", "/mcore", "--dtype", dtype]
    assert run_8xh20([*there, "/ignored"]) == run_8xh20(there)
    back = run_8xh20(["8B", "/mcore", "/out", "true", "true", dtype, "/hf"])
    assert back == ["megatron-to-hf", "/mcore", "/out", "--hf", "/hf", "--dtype", dtype]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["8B", "/a"], "wrong number"),
        (["8B", "/a", "/b", "yes", "true", "bf16"], "MG2HF"),
        (["8B", "/a", "/b", "false", "true", "bf8"], "PR"),
        (["8B", "/a", "/b", "true", "true", "bf16"], "HF_DIR is missing"),
    ],
)
def test_run_8xh20_refuses_what_the_script_would_not_take(arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        run_8xh20(arguments)


@pytest.mark.parametrize(
    ("call", "native"),
    [
        ("Qwen3VLConverter hf_to_dcp --hf_dir h --dcp_dir d", "hf-to-dcp h d --style 2025"),
        (
            "Qwen3VLConverter hf_to_dcp --hf_dir=h --dcp_dir=d --tie_weight=True",
            "hf-to-dcp h d --style 2025 --tie-weight",
        ),
        ("GenericDCPConverter hf_to_dcp --hf_dir h --dcp_dir d", "hf-to-dcp h d --style 2026"),
        (
            "GenericDCPConverter hf_to_dcp --hf_dir h --dcp_dir d --dcp_prefix model.",
            "hf-to-dcp h d --style 2025",
        ),
        ("Qwen3VLConverter dcp_to_hf --load_dir d --save_dir o --model_assets_dir h", "dcp-to-hf d o --hf h"),
        (
            "GenericDCPConverter hf_to_dcp --hf_dir h --dcp_dir d --trust_remote_code True "
            '--tie_weight_mapping {"lm_head.weight":"model.embed_tokens.weight"}',
            "hf-to-dcp h d --style 2026 --tie-weight",
        ),
        (
            "ExpertMergeDcpConverter hf_to_dcp --hf_dir h --save_dir d",
            "hf-to-dcp h d --style 2025 --merge-experts",
        ),
        (
            "ExpertMergeDcpConverter hf_to_dcp --hf_dir h --save_dir d --dcp_prefix=",
            "hf-to-dcp h d --style 2026 --merge-experts",
        ),
        ("ExpertMergeDcpConverter dcp_to_hf --hf_dir h --dcp_dir d --save_dir o", "dcp-to-hf d o --hf h"),
    ],
)
def test_mm_convert_maps_every_dcp_call(call, native) -> None:
    assert mm_convert(call.split()) == native.split()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("Qwen3VLConverter", "wrong number"),
        ("Qwen2_5_VLConverter hf_to_mm --hf_dir h", "any layout"),
        ("Qwen3VLConverter resplit", "unknown converter or method"),
        ("Qwen3VLConverter hf_to_dcp --hf_dri h", "unknown flag"),
        ("Qwen3VLConverter hf_to_dcp --hf_dir", "no value"),
        ("Qwen3VLConverter hf_to_dcp --hf_dir h", "--dcp_dir"),
        ("GenericDCPConverter hf_to_dcp --hf_dir h --dcp_dir d --dcp_prefix x.", "dcp_prefix"),
        ("GenericDCPConverter hf_to_dcp --hf_dir h --dcp_dir d --fused_linear_names qkv", "no counterpart"),
        ("GenericDCPConverter hf_to_dcp --hf_dir h --dcp_dir d --tie_weight_mapping {a:b}", "no such tie"),
        ("Qwen3VLConverter hf_to_dcp --hf_dir h --dcp_dir d --tie_weight maybe", "--tie_weight"),
    ],
)
def test_mm_convert_refuses_what_has_no_counterpart(call, words) -> None:
    with pytest.raises(ConfigError, match=words):
        mm_convert(call.split())
