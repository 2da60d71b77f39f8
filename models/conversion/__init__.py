# SPDX-License-Identifier: Apache-2.0
"""Engine for the weight tables: Hugging Face, torch_dist and DCP checkpoints."""
