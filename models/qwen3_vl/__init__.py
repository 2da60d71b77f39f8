# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, dense and MoE: interleaved mRoPE, interpolated positions, deepstack."""
