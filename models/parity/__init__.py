# SPDX-License-Identifier: Apache-2.0
"""Comparison of our models with transformers, and of parallel layouts with one process."""
