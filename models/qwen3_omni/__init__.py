# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: Qwen3-VL's decoder and vision tower, an audio tower, one position clock."""
