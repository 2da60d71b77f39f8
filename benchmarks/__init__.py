# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: programs that measure; none of them is a test."""
