# SPDX-License-Identifier: Apache-2.0
"""Looking at a model: captions and answers from a checkpoint, and what they are worth on held-out samples.

Two engines give the same answers: `transformers` runs a Hugging Face folder with a key-value cache, `megatron` runs
our own model, which recomputes the sequence for every token and is meant for checks and small models.
"""
