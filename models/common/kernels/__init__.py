# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA: several passes over memory that torch or TransformerEngine would make, joined into one.

Imported only where the TransformerEngine backend runs. Each has a plain torch equivalent in its test, and runs on a CPU
under ``TRITON_INTERPRET=1``.
"""
