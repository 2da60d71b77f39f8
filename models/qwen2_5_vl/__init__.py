# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: sectioned mRoPE, window attention in the vision tower."""
